"""Arrays on a GPU, through CuPy, and in host memory, through NumPy."""

import re
from typing import Any

import numpy as np

from fastcal.errors import GPU_EXTRAS, FastcalError, UnavailableError

#: DLPack's numbers of CUDA's memory on a device and its managed memory.
_DLPACK_CUDA = (2, 13)


def resolve(device: str) -> int | None:
    """The number of the GPU that `device` names; None for the CPU.

    Args:
        device: "cpu", "cuda" (CuPy's current device), "cuda:N", or "auto": "cuda" where there is a GPU and CuPy, else
            "cpu".

    Raises:
        FastcalError: There is no such device, or CuPy is missing.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise FastcalError(f"there is no device {device!r}; choose auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return None
    try:
        import cupy
    except ImportError as error:
        if device == "auto":
            return None
        raise UnavailableError(f"device {device} needs CuPy, which is not installed: {GPU_EXTRAS}", "CuPy") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, or none that fits
        count = 0
    if device == "auto" and not count:
        return None
    number = int(cupy.cuda.runtime.getDevice()) if match[1] is None and count else int(match[1] or 0)
    if number >= count:
        raise UnavailableError(f"there is no device {device}: CUDA sees {count} GPUs here; use auto or cpu")
    return number


def to_host(array: Any) -> Any:
    """A NumPy array of the same values: the array itself unless it lies on a GPU."""
    if hasattr(array, "__cuda_array_interface__"):
        import cupy

        return cupy.asnumpy(array)
    return array


def is_on_gpu(array: Any) -> bool:
    """Whether it is an array on a GPU: any library's that has the CUDA array interface or speaks DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA


def type_of(array: Any) -> np.dtype[Any]:
    """An array's type as NumPy's, also where the array is not (PyTorch's, say)."""
    if hasattr(array, "__cuda_array_interface__"):
        array_type: np.dtype[Any] = np.dtype(array.__cuda_array_interface__["typestr"])
    else:
        array_type = np.asarray(array).dtype
    return array_type


def as_cupy(array: Any) -> Any:
    """Another library's array on a GPU as CuPy's, over the same memory, once it is filled.

    Raises:
        FastcalError: CuPy is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise UnavailableError(
            f"a {type(array).__name__} lies on a GPU, and CuPy, which reads it, is not installed: {GPU_EXTRAS}", "CuPy"
        ) from error
    if hasattr(array, "__cuda_array_interface__"):
        with _device_of(array):  # on another, CuPy would copy it there
            imported = cupy.asarray(array)
            wait_until_filled(array)
        return imported
    imported = cupy.from_dlpack(array)  # which CuPy's current stream waits for
    with imported.device:
        cupy.cuda.get_current_stream().synchronize()
    return imported


def upload(array: Any, name: str, kept: dict[str, Any]) -> Any:
    """Copy a NumPy array to CuPy's current GPU, in the order of its current stream; returns when it was read.

    Args:
        array: The array, which may lie in pinned memory.
        name: What it is for.
        kept: Arrays on the GPU by what they are for: the last one is written again if it is of that shape and type.
    """
    import cupy

    array = np.asarray(array, order="C")  # of no dimensions too, unlike ascontiguousarray's
    target = kept.get(name)
    if target is None or (target.shape, target.dtype) != (array.shape, array.dtype):
        target = kept[name] = cupy.empty(array.shape, array.dtype)
    target.set(array)
    cupy.cuda.get_current_stream().synchronize()
    return target


def _device_of(array: Any) -> Any:
    """The `cupy.cuda.Device` that an array with the CUDA array interface lies on."""
    import cupy

    address = array.__cuda_array_interface__["data"][0]
    # An array without elements may lie nowhere.
    return cupy.cuda.Device(cupy.cuda.runtime.pointerGetAttributes(address).device if address else None)


def wait_until_filled(array: Any) -> None:
    """Wait for what another library still does to its array on a GPU, which is current.

    From its version 3 on the CUDA array interface names the stream to wait for. Where it does not, as PyTorch's does
    not, DLPack has the library make CuPy's current stream wait for the library's own; an array that speaks neither is
    taken to be filled on CUDA's default stream.
    """
    interface = array.__cuda_array_interface__
    stream = interface.get("stream", 1)  # 1 is CUDA's own handle of its default stream
    if stream is None:
        return
    import cupy

    if "stream" not in interface and hasattr(array, "__dlpack__"):
        cupy.from_dlpack(array)
        cupy.cuda.get_current_stream().synchronize()
    else:
        cupy.cuda.runtime.streamSynchronize(stream)
