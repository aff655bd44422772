"""Lists of samples: with labels, CSV, Ultralytics' data.yaml, COCO's JSON."""

import json
import logging
import os

import pytest

from fastcal import FastcalError
from fastcal.feed.dataset import list_files


@pytest.fixture
def folder(tmp_path):
    """A data set of Ultralytics' layout, with names that have blanks and commas."""
    for split in ("train", "val"):
        for name in ("b.jpg", "a 1.jpg", "c,d.png"):
            path = tmp_path / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff\xd8\xff\xe0")
    return tmp_path


def found(data, root):
    listing = list_files(data)
    assert listing.kind == "image"
    return [os.path.relpath(path, root) for path in listing.paths]


@pytest.mark.parametrize(
    "lines",
    [
        "b.jpg 3\na 1.jpg 4\nc,d.png 5\n",
        "b.jpg\t3\r\na 1.jpg\t4\r\nc,d.png\t5\r\n",
        'b.jpg,3\na 1.jpg,4\n"c,d.png",5\n',
        'image,label,x\nb.jpg,3,0.5\na 1.jpg,4,0.5\n"c,d.png",5,0.5\n',
        'id;path\n0;b.jpg\n1;a 1.jpg\n2;"c,d.png"\n',
        "3 b.jpg\na 1.jpg 4 5\nc,d.png 5\n",
        "  b.jpg  \na 1.jpg\nc,d.png\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_beside_the_paths_are_left_out(folder, lines, encoding):
    images = folder / "images" / "val"
    if "4 5" in lines:
        lines = lines.replace("4 5", "4")
    (images / "list.csv").write_bytes(lines.encode(encoding))
    assert found(images / "list.csv", images) == ["b.jpg", "a 1.jpg", "c,d.png"]


def test_a_missing_file_of_a_list_with_labels_is_named(folder):
    images = folder / "images" / "val"
    for text, number in (
        ("gone.jpg 1\nb.jpg 2\n", 1),
        ("b.jpg 1\ngone.jpg 2\n", 2),
        ("path,x\nb.jpg,1\ngone.jpg,2", 2),
    ):
        (images / "list.txt").write_text(text)
        with pytest.raises(FastcalError, match=rf"list.txt, entry {number}: no such file: .*gone.jpg.*; correct or"):
            list_files(images / "list.txt")


def test_names_in_a_list_may_be_any_bytes(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(name, "wb") as file:
        file.write(b"x")
    (tmp_path / "list.txt").write_bytes(b"\xff.jpg\n")
    assert [os.fsencode(path) for path in list_files(tmp_path / "list.txt").paths] == [name]


def yaml(folder, text, name="data.yaml"):
    (folder / name).write_text(text)
    return folder / name


VAL = [f"images/val/{name}" for name in ("a 1.jpg", "b.jpg", "c,d.png")]
TRAIN = [path.replace("val", "train") for path in VAL]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: .\ntrain: images/train\nval: images/val\nnames: {0: cat}\n", VAL),
        ("train: images/train\nval:\nnc: 80\n", TRAIN),
        ("train: ../images/train\nval: ../images/val\n", VAL),
        ("path: ../nowhere\nval: images/val\n", VAL),
        ("val: [images/train, images/val]\n", TRAIN + VAL),
        ("val: images/val/b.jpg\n", ["images/val/b.jpg"]),
        ("val: val.txt\n", ["images/train/b.jpg"]),
    ],
)
def test_ultralytics_data_yaml(folder, caplog, text, expected):
    (folder / "val.txt").write_text("./images/train/b.jpg\n")
    with caplog.at_level(logging.INFO, "fastcal"):
        assert found(yaml(folder, text), folder) == expected
    assert f"the images of {'train' if expected == TRAIN else 'val'} are used" in caplog.text


def test_a_data_yaml_with_an_absolute_path(folder, tmp_path_factory):
    place = yaml(tmp_path_factory.mktemp("elsewhere"), f"path: {folder}\nval: images/val\n")
    assert found(place, folder) == VAL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {0: cat}\n", r"data.yaml names no images: it has neither val nor train nor test"),
        ("- a\n- b\n", r"data.yaml names no images"),
        ("val: [\n", r"data.yaml is no YAML: .*; correct it"),
        ("val: images/none\n", r"no such file or folder: .*images/none"),
    ],
)
def test_a_data_yaml_without_images(folder, text, message):
    with pytest.raises(FastcalError, match=message):
        list_files(yaml(folder, text))


def coco(path, names):
    path.parent.mkdir(exist_ok=True)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": []}))
    return path


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("annotations/instances_val.json", ["c,d.png", "b.jpg"]),
        ("instances_val.json", ["c,d.png", "b.jpg"]),
        ("images/val/_annotations.coco.json", ["c,d.png", "b.jpg"]),
        ("images/labels.json", ["val/c,d.png", "val/b.jpg"]),
        ("all.json", ["val/c,d.png", "val/b.jpg"]),
        ("all.json", ["images/val/c,d.png", "images/val/b.jpg"]),
    ],
)
def test_coco(folder, place, names):
    assert found(coco(folder / place, names), folder) == ["images/val/c,d.png", "images/val/b.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": []}', r"x.json lists no images"),
        ('{"scales": {}}', r"x.json is JSON without COCO's \"images\" and \"file_name\"; name the images another way"),
        ('{"images": [{"id": 1}]}', r"x.json is JSON without COCO's"),
        ('["a.jpg"]', r"x.json is JSON without COCO's"),
        (
            '{"images": [{"file_name": "gone.jpg"}]}',
            r"x.json lists gone.jpg, which is neither beside it nor",
        ),
        ('{"images": ', r"x.json is no JSON: Expecting value.*; correct it"),
    ],
)
def test_json_that_is_not_cocos(folder, content, message):
    (folder / "x.json").write_text(content)
    with pytest.raises(FastcalError, match=message):
        list_files(folder / "x.json")


def test_a_coco_file_names_an_image_that_is_gone(folder):
    with pytest.raises(FastcalError, match=r"COCO file .*, entry 2: no such file: .*gone.jpg"):
        list_files(coco(folder / "images/val/x.json", ["b.jpg", "gone.jpg"]))
