"""What tells samples from others."""

import subprocess
import sys
import tempfile
from pathlib import Path


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
