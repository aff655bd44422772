"""The codecs that decoders load: those for a GPU only if a GPU decodes."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, fastcal
from fastcal.feed.codecs import chosen_codecs
from fastcal.feed.pipeline import ImagePipeline
from fastcal.feed import pipeline
pipeline.chosen_codecs = lambda on_gpu: chosen_codecs(on_gpu=sys.argv[1] == "gpu")
with fastcal.ImageFeed(sys.argv[2], preprocess="unit", device="cpu") as feed:
    assert len(list(feed)) == 1
    loaded = open("/proc/self/maps").read()
print("libnvjpeg" in loaded, "libjpeg_turbo_ext" in loaded)
"""


def run(where, photographs, **environment):
    command = [sys.executable, "-c", PROGRAM, where, photographs]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nvjpeg_is_loaded_only_for_a_gpu(photographs):
    assert run("gpu", photographs) == ["True", "True"]
    assert run("cpu", photographs) == ["False", "True"]


def test_a_folder_of_the_users_stays(photographs, tmp_path):
    from importlib.util import find_spec
    from pathlib import Path

    folder = Path(find_spec("nvidia.nvimgcodec").origin).parent / "extensions"
    for library in folder.iterdir():
        (tmp_path / library.name).symlink_to(library)
    assert run("cpu", photographs, NVIMGCODEC_EXTENSIONS_PATH=str(tmp_path)) == ["True", "True"]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_environment_is_as_before(on_gpu):
    from fastcal.feed.codecs import chosen_codecs

    before = dict(os.environ)
    with chosen_codecs(on_gpu=on_gpu):
        assert ("NVIMGCODEC_EXTENSIONS_PATH" in os.environ) is not on_gpu
    assert dict(os.environ) == before
