import logging
import os
import subprocess
import sys

import pytest

from fastcal.errors import FastcalError
from fastcal.feed.dataset import list_files
from fastcal.feed.dataset import order as order_of


def list_images(data):
    listing = list_files(data)
    assert listing.kind == "image"
    return listing.paths


def order(paths, **options):
    return [paths[place] for place in order_of(paths, **options)]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.JPG", "a/z.png", "a/é ü.jpeg", ".hidden.jpg", "notes.txt", "a/c.d/deep.webp"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "data"


def test_a_folder_is_searched_with_its_folders_and_sorted(folder, caplog):
    with caplog.at_level(logging.INFO, "fastcal"):
        found = [os.path.relpath(path, folder) for path in list_images(folder)]
    assert found == ["a/c.d/deep.webp", "a/z.png", "a/é ü.jpeg", "b.JPG"]
    assert "left out 2 files" in caplog.text


def test_links_are_followed_and_circles_end(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.jpg").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "circle").symlink_to(folder)
    found = [os.path.relpath(path, folder) for path in list_images(folder)]
    assert found == ["a/c.d/deep.webp", "a/z.png", "a/é ü.jpeg", "b.JPG", "link/linked.jpg"]


def test_a_list_file_is_relative_to_itself_and_keeps_its_order(folder):
    (folder / "list.txt").write_text("b.JPG\n\na/é ü.jpeg\n" + str(folder / "a/z.png") + "\n")
    assert list_images(folder / "list.txt") == [
        str(folder / "b.JPG"), str(folder / "a/é ü.jpeg"), str(folder / "a/z.png")
    ]  # fmt: skip


def test_one_image_and_a_sequence_of_paths(folder):
    assert list_images(str(folder / "b.JPG")) == [str(folder / "b.JPG")]
    assert list_images([folder / "b.JPG", str(folder / "a/z.png")]) == [str(folder / "b.JPG"), str(folder / "a/z.png")]


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(name, "wb") as file:
        file.write(b"x")
    assert [os.fsencode(path) for path in list_images(tmp_path)] == [name]


def test_a_pattern(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert list_images("a/**/*") == ["a/c.d/deep.webp", "a/z.png", "a/é ü.jpeg"]
    assert list_images("*.[jJ]*") == ["b.JPG"]
    (folder / "[x].png").write_bytes(b"x")
    assert list_images("[x].png") == ["[x].png"]


def test_classes_by_turns():
    paths = [f"/data/{name}" for name in ("cat/1", "cat/2", "cat/3", "dog/1", "fish/deep/1", "fish/deep/2")]
    turns = ["cat/1", "dog/1", "fish/deep/1", "cat/2", "fish/deep/2", "cat/3"]
    assert order(paths, shuffle=False, seed=0, balance=True, limit=5) == [f"/data/{name}" for name in turns[:5]]
    backwards = ["cat/3", "dog/1", "fish/deep/2", "cat/2", "fish/deep/1", "cat/1"]
    found = order(paths[::-1], shuffle=False, seed=0, balance=True, limit=None)
    assert found == [f"/data/{name}" for name in backwards]
    shuffled = order(paths, shuffle=True, seed=1, balance=True, limit=3)
    assert sorted(path.split("/")[2] for path in shuffled) == ["cat", "dog", "fish"]
    assert shuffled == order(paths, shuffle=True, seed=1, balance=True, limit=3)


def test_classes_by_turns_of_relative_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["cat/1", f"{tmp_path}/cat/2", f"{tmp_path}/dog/1"]
    assert order(paths, shuffle=False, seed=0, balance=True, limit=2) == [paths[0], paths[2]]


def test_one_class_is_not_balanced(folder):
    with pytest.raises(
        FastcalError, match=r"the images in .*c.d are of one class; balancing needs a folder of folders"
    ):
        order(list_images(folder / "a" / "c.d"), shuffle=False, seed=0, balance=True, limit=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing", r"no such file or folder: .*missing"),
        ("empty", r"empty is empty; name a folder with .bmp, .*"),
        ("texts", r"texts has 1 file, none of them an image \(.*readme.md is a text file\); name a folder with .bmp, "),
        ("*.heic", r"pattern .*\*.heic matches nothing; name a folder with .bmp, "),
        ("nothing.txt", r"list file .*nothing.txt is empty"),
        ("wrong.txt", r"wrong.txt, entry 2: no such file: .*gone.jpg"),
        ("train.tar.gz", r"train.tar.gz is compressed; shards are read as they are, so decompress it"),
        ("x" * 300, r"no such file or folder: .*x{300}; name a folder, a pattern, a list file or a file"),
        ("{0..999999999999999999}.jpg", r"pattern .*, entry 2: no such file: .*/1.jpg; correct or remove it"),
        ("{0..999999999999}{5..3}.jpg", r"range {5..3} of pattern .* has no numbers; give the smaller one first"),
        ("binary.bin", r"cannot read list file .*binary.bin: .*one path a line"),
    ],
)
def test_no_images(folder, data, message):
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "readme.md").write_text("x")
    (folder / "nothing.txt").write_text("\n\n")
    (folder / "wrong.txt").write_text("b.JPG\ngone.jpg\n")
    (folder / "0.jpg").write_bytes(b"x")
    (folder / "train.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FastcalError, match=message):
        list_images(folder / data)


def test_a_list_file_that_begins_with_a_byte_order_mark(folder):
    (folder / "list.txt").write_text("b.JPG\r\n", encoding="utf-8-sig")
    assert list_images(folder / "list.txt") == [str(folder / "b.JPG")]


def test_a_folder_that_cannot_be_read_is_not_passed_over(folder):
    (folder / "a").chmod(0)
    program = (
        "import os, sys; from fastcal.errors import FastcalError; from fastcal.feed.dataset import list_files\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: list_files('.')\n"
        "except FastcalError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    (folder / "a").chmod(0o755)
    assert done.stdout == "cannot read folder ./a: Permission denied; make it readable, or remove it\n"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_its_range(seed):
    with pytest.raises(FastcalError, match=rf"seed is {seed}; it must be from 0 to 4294967295"):
        order(["a", "b"], shuffle=True, seed=seed, balance=False, limit=None)


def test_no_paths():
    with pytest.raises(FastcalError, match="the list of paths is empty"):
        list_images([])


def test_order_without_shuffling():
    assert order(["a", "b", "c"], shuffle=False, seed=3, balance=False, limit=2) == ["a", "b"]
    assert order(["a", "b", "c"], shuffle=False, seed=3, balance=False, limit=None) == ["a", "b", "c"]


def test_the_seed_decides_the_shuffled_order():
    paths = [f"{number:02}" for number in range(30)]
    shuffled = order(paths, shuffle=True, seed=1, balance=False, limit=None)
    assert sorted(shuffled) == paths != shuffled
    assert order(paths, shuffle=True, seed=1, balance=False, limit=5) == shuffled[:5]
    assert order(paths, shuffle=True, seed=2, balance=False, limit=None) != shuffled
    program = (
        "from fastcal.feed.dataset import order;"
        "print(order([f'{number:02}' for number in range(30)], shuffle=True, seed=1, balance=False, limit=None))"
    )
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str([int(path) for path in shuffled])


def test_a_spread_limit_takes_samples_from_all():
    paths = [f"/data/{name}/{number}" for name in ("cat", "dog", "fish") for number in range(4)]
    options = {"shuffle": False, "seed": 0, "balance": False, "spread": True}
    assert order(paths, limit=3, **options) == ["/data/cat/0", "/data/dog/0", "/data/fish/0"]
    assert order(paths, limit=5, **options) == [paths[number] for number in (0, 2, 4, 7, 9)]
    assert order(paths, limit=None, **options) == order(paths, limit=99, **options) == paths
