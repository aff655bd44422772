"""On a GPU: unreadable images, shards, several inputs and every format, as on the CPU."""

import numpy as np
import pytest
from PIL import Image
from test_formats import variants
from test_images_gpu import ON_GPU
from test_inputs import data_of, scene_numbers, scenes  # noqa: F401 - a fixture
from test_shards import as_files, encoded, shards  # noqa: F401 - fixtures
from test_unreadable import write_numbered

from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.image_pass import ImagePass

pytestmark = pytest.mark.gpu

SMALL = Preprocess(size=(16, 16))


def all_of(feed):
    """The batches of a pass, copied to the host."""
    with feed:
        return [
            {name: array.get() if hasattr(array, "get") else array.copy() for name, array in batch.items()}
            for batch in feed
        ]


def numbers(batches):
    return [np.rint(batch["input"].mean(axis=(1, 2, 3)) / 5).astype(int).tolist() for batch in batches]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({3}, [[0, 1, 2, 4], [5, 6, 7, 8], [9, 0, 1, 2]]),
        ({0, 1, 2, 3, 4}, [[5, 6, 7, 8], [9, 5, 6, 7]]),
        ({8, 9}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({0, 9}, [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ],
)
def test_the_next_images_fill_up(tmp_path, depth, broken, expected):
    write_numbered(tmp_path, 10, broken)
    feed = ImageFeed(
        tmp_path, preprocess=SMALL, batch_size=4, **ON_GPU, skip_unreadable=True, max_unreadable=50,
        prefetch_queue_depth=depth,
    )  # fmt: skip
    for _ in range(3):
        assert numbers(all_of(feed)) == expected
        assert len(feed) == len(expected)
    assert feed.skipped == [str(tmp_path / f"{number:02}.jpg") for number in sorted(broken)]


def test_after_a_failure_images_are_tried_before_the_pipeline_gets_them(tmp_path, monkeypatch):
    failures = []
    recover = ImagePass._recover
    monkeypatch.setattr(ImagePass, "_recover", lambda *arguments: (failures.append(1), recover(*arguments)))
    write_numbered(tmp_path, 50, set(range(10, 50, 5)))
    feed = ImageFeed(tmp_path, preprocess=SMALL, batch_size=4, **ON_GPU, skip_unreadable=True, max_unreadable=50)
    all_of(feed)
    assert feed.skipped == [str(tmp_path / f"{number:02}.jpg") for number in range(10, 50, 5)]
    assert len(failures) == 1


def test_a_truncated_jpeg_is_as_unreadable_as_on_the_cpu(tmp_path):
    for progressive in (False, True):
        path = tmp_path / f"{progressive}.jpg"
        Image.effect_noise((200, 150), 80).convert("RGB").save(path, progressive=progressive)
        whole = path.read_bytes()
        for missing in (1, 2, 3, 10, 100, 1000, len(whole) // 2, len(whole) - 700, len(whole) - 100):
            (tmp_path / f"{progressive} {missing:06}.jpg").write_bytes(whole[:-missing])
    skipped = {}
    for options in ({"device": "cpu"}, ON_GPU, {"device": "cuda"}):
        feed = ImageFeed(tmp_path, preprocess=SMALL, batch_size=4, skip_unreadable=True, max_unreadable=100, **options)
        all_of(feed)
        skipped[str(options)] = feed.skipped
    on_cpu, *others = skipped.values()
    assert others == [on_cpu, on_cpu]
    assert len(on_cpu) >= 10


def test_shards_give_what_files_do(as_files, shards):  # noqa: F811 - fixtures
    folder, _ = shards
    for options in ({"batch_size": 3}, {"batch_size": 16}, {"batch_size": 4, "limit": 5}):
        expected = all_of(ImageFeed(as_files, preprocess=SMALL, **ON_GPU, **options))
        feed = ImageFeed(folder, preprocess=SMALL, **ON_GPU, **options)
        for _ in range(2):
            for one, other in zip(all_of(feed), expected, strict=True):
                # An image's last bit depends on whether the JPEG engine or the processors decode it.
                np.testing.assert_allclose(one["input"], other["input"], atol=1)


def test_several_inputs_and_arrays(scenes):  # noqa: F811 - a fixture
    import cupy

    feed = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=3, **ON_GPU)
    with feed:
        batch = next(iter(feed))
        for array in batch.values():
            assert isinstance(array, cupy.ndarray)
            assert array.dtype == np.float32
    assert scene_numbers(all_of(feed)) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    (scenes / "right" / "3.png").write_bytes(b"no image")
    (scenes / "left" / "6.npy").write_bytes(b"no array")
    feed = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=3, **ON_GPU, skip_unreadable=True, max_unreadable=50)
    for _ in range(2):
        assert scene_numbers(all_of(feed)) == [0, 1, 2, 4, 5, 0]


def test_every_format_is_decoded_as_on_the_cpu(real_photographs, tmp_path):
    for name, data in variants(real_photographs[3]):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "rgb.jpg").unlink()  # which would have all decoded on the CPU
    preprocess = Preprocess(size=(160, 200))
    on_cpu, on_gpu = (
        ImageFeed(tmp_path, preprocess=preprocess, batch_size=1, **options) for options in ({"device": "cpu"}, ON_GPU)
    )
    worst = {}
    for path, one, other in zip(on_cpu.paths, all_of(on_cpu), all_of(on_gpu), strict=True):
        difference = np.abs(one["input"] - other["input"])
        worst[path.rpartition("/")[2]] = float(difference.mean()), float(np.percentile(difference, 99.9))
    print(worst)
    assert max(mean for mean, _ in worst.values()) <= 0.1
    assert max(high for _, high in worst.values()) <= 3
    assert all(highs == (0, 0) for name, highs in worst.items() if not name.endswith(".jpg"))


def test_jpegs_of_rgb_components_are_decoded_on_the_cpu(real_photographs, tmp_path, caplog):
    photograph = Image.open(real_photographs[3])
    for number in range(5):
        photograph.save(tmp_path / f"{number}.jpg", keep_rgb=number != 1)
    feeds = [ImageFeed(tmp_path, preprocess=SMALL, batch_size=5, **options) for options in ({"device": "cpu"}, ON_GPU)]
    batches = [all_of(feed) for feed in feeds]
    assert np.abs(batches[0][0]["input"] - batches[1][0]["input"]).max() <= 1
    (said,) = [record.getMessage() for record in caplog.records if "RGB" in record.getMessage()]
    assert said.startswith(f"{tmp_path}/0.jpg has RGB components")


def test_what_cannot_be_decoded_is_named_before_the_first_batch(tmp_path):
    for number in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number + 10}.tif").write_bytes(b"II*\0 no image")
    with (
        ImageFeed(tmp_path, preprocess=SMALL, batch_size=2, **ON_GPU) as feed,
        pytest.raises(
            FastcalError,
            match=r"DALI decodes no .tif image here: tried .*10.tif, .*11.tif, .*12.tif; convert them or leave",
        ),
    ):
        next(iter(feed))
