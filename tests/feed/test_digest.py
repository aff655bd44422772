"""What tells samples from others."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import alter
from fastcal.feed.dataset import BY_CONTENT, BY_SIZE, add_files


def test_a_file_that_cannot_be_read_is_none_that_can():
    """Where files may be unreadable; root, who may read any, becomes nobody for that."""
    program = (
        "import hashlib, os, sys; from fastcal.feed.dataset import add_files\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "digest = hashlib.sha256(); add_files(digest, sys.argv[1:], lenient=True); print(digest.hexdigest())"
    )
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is closed to others
        Path(folder).chmod(0o755)
        file = Path(folder, "0.jpg")
        file.write_bytes(b"x")
        found = []
        for mode in (0o644, 0, 0o644):
            file.chmod(mode)
            done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
            found.append(done.stdout)
    assert found[0] == found[2] != found[1]


def test_of_many_bytes_the_sizes_count(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcal.feed.dataset._MOST_HASHED", 5)

    def digest():
        found = hashlib.sha256()
        return add_files(found, [str(tmp_path / "a"), str(tmp_path / "b")]), found.hexdigest()

    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"345")
    by_content, before = digest()
    alter(tmp_path / "b")
    assert (digest()[0], by_content) == (BY_CONTENT, BY_CONTENT)
    assert digest()[1] != before
    (tmp_path / "b").write_bytes(b"3456")
    by_size, before = digest()
    alter(tmp_path / "b")
    assert digest() == (by_size, before) == (BY_SIZE, before)
    (tmp_path / "b").write_bytes(b"34567")
    assert digest()[1] != before
