import errno
import os
import subprocess
import sys

import pytest

from fastcal import FastcalError
from fastcal.files import check_writable, write_atomically, write_together


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("act", [lambda path: write_atomically(path, b"x"), lambda path: check_writable(path, 1)])
def test_places_where_no_file_can_be(tmp_path, act):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x", "there is no folder"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(FastcalError, match=message):
            act(path)
    assert os.listdir(tmp_path) == ["pipe"]


def test_several_files_are_written_or_none(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(FastcalError, match="b: it is a folder"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    write_together({tmp_path / "a": b"new", tmp_path / "c": b"too"})
    assert [(tmp_path / name).read_bytes() for name in ("a", "c")] == [b"new", b"too"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_nobody_elses_temporary_file_is_touched(tmp_path):
    (tmp_path / f".x.{os.getpid()}.tmp").write_bytes(b"of another thread, or of a process killed before")
    write_atomically(tmp_path / "x", b"x")
    check_writable(tmp_path / "x", 1)
    assert sorted(os.listdir(tmp_path)) == [f".x.{os.getpid()}.tmp", "x"]


def test_checking_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    check_writable(tmp_path / "old", 1000)
    check_writable(tmp_path / "new", 1000)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


PROGRAM = """
import resource, sys
from fastcal import FastcalError
from fastcal.files import check_writable, write_atomically
path, limit = sys.argv[1], int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def check():
    check_writable(path, 2_000_000)
for act in (lambda: write_atomically(path, b"x" * 2_000_000), check):
    try:
        act()
    except FastcalError as error:
        print(error)
"""


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", PROGRAM, path, "1500000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"cannot write {path}: File too large; make room or choose another place"] * 2
    assert os.listdir(tmp_path) == ["old"]
    assert path.read_bytes() == b"old"


def test_a_disk_that_is_too_small(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process mount a small disk")
    script = 'mount -t tmpfs -o size=1M none "$0" && "$@"; ls -A "$0"'
    command = ["unshare", "-rm", "sh", "-c", script, tmp_path, sys.executable, "-c", PROGRAM, tmp_path / "x", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = f"cannot write {tmp_path}/x: No space left on device; make room or choose another place"
    assert done.stdout.splitlines() == [text] * 2


def test_where_reserving_fails_nothing_is_written(tmp_path, monkeypatch):
    def is_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    with pytest.raises(FastcalError, match="No space left on device; make room"):
        check_writable(tmp_path / "x", 1)
    assert os.listdir(tmp_path) == []
