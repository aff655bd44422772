"""What a build for the DLA tells TensorRT's builder, on TensorRT for RTX, which has no DLA."""

from types import SimpleNamespace

import pytest

import fastcal
from conftest import start_rtx
from fastcal.engine.settings import BuildSettings
from fastcal.library import logger_of

rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def builder():
    return start_rtx().Builder(logger_of(rtx))


def test_a_core_that_is_not_there_is_named(builder):
    message = (
        "dla is 1, and TensorRT finds 0 DLA cores here: the first one is 0, on Jetson Xavier and Orin; leave dla out"
    )
    with pytest.raises(fastcal.UnavailableError, match=message):
        BuildSettings(dla=1).configure(rtx, builder)


@pytest.mark.parametrize("gpu_fallback", [False, True])
def test_the_config_is_for_the_dla(builder, gpu_fallback):
    with_cores = SimpleNamespace(num_DLA_cores=2, create_builder_config=builder.create_builder_config)
    config = BuildSettings(dla=1, gpu_fallback=gpu_fallback).configure(rtx, with_cores)
    assert config.default_device_type == rtx.DeviceType.DLA
    assert config.get_flag(rtx.BuilderFlag.GPU_FALLBACK) == gpu_fallback
    assert BuildSettings().configure(rtx, builder).default_device_type == rtx.DeviceType.GPU


def test_the_core_is_the_one_that_was_asked_for():
    """With a stand-in for the config: TensorRT for RTX forgets the core."""
    config = SimpleNamespace()
    with_cores = SimpleNamespace(num_DLA_cores=2, create_builder_config=lambda: config)
    BuildSettings(dla=1).configure(rtx, with_cores)
    assert config.DLA_core == 1
