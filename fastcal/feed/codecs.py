"""The codecs that DALI's image decoder loads."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

#: The variable with the folder that nvImageCodec loads its codecs from.
_VARIABLE = "NVIMGCODEC_EXTENSIONS_PATH"

#: The beginnings of the names of codecs that decode on a GPU.
_ON_GPU = ("libnvjpeg", "libnvtiff")

_lock = threading.Lock()  # the environment is the process's


@contextmanager
def chosen_codecs(*, on_gpu: bool) -> Iterator[None]:
    """Have decoders that are made meanwhile load the codecs for a GPU, or not.

    nvJPEG takes 1.6 s to start (H100, driver 580), even if the CPU is to decode all images.
    """
    package = find_spec("nvidia.nvimgcodec")
    folder = None if package is None or package.origin is None else Path(package.origin).parent / "extensions"
    with _lock:
        if on_gpu or folder is None or not folder.is_dir() or _VARIABLE in os.environ:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="fastcal-") as chosen:
            for library in folder.iterdir():
                if not library.name.startswith(_ON_GPU):
                    (Path(chosen) / library.name).symlink_to(library)
            os.environ[_VARIABLE] = chosen
            try:
                yield
            finally:
                del os.environ[_VARIABLE]
