"""Devices, and arrays on a GPU (CuPy) and in host memory (NumPy)."""

import re
from typing import Any

import numpy as np

from fastcal.errors import CUPY, FastcalError, UnavailableError
from fastcal.wake import widen_queues

#: DLPack's numbers of CUDA's memory on a device and its managed memory.
_DLPACK_CUDA = (2, 13)


def resolve(device: str) -> int | None:
    """Return the number of the GPU that `device` names; None for the CPU.

    "cuda" is CuPy's current device; "auto" is "cuda" if there are a GPU and CuPy, else "cpu".
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise FastcalError(f"there is no device {device!r}; choose auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return None
    widen_queues()
    try:
        import cupy
    except Exception as error:
        if device == "auto":
            return None
        fault = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported here ({error})"
        raise UnavailableError(f"device {device} needs CuPy, which {fault}: {CUPY}", "CuPy") from error
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
    """Return a NumPy array of the same values: the array itself unless it lies on a GPU."""
    if hasattr(array, "__cuda_array_interface__"):
        import cupy

        return cupy.asnumpy(array)
    return array


def kept_type(dtype: Any) -> np.dtype[Any]:
    """Return the type of `dtype`'s arrays in a batch: float32 for float64, else `dtype` in native byte order."""
    kept: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    return np.dtype(np.float32) if kept == np.float64 else kept


def as_array(values: Any) -> Any:
    """Return values as a NumPy array of the type in which a batch has them."""
    array = np.asarray(values)
    return array.astype(kept_type(array.dtype), copy=False)


def add_array(digest: Any, name: str, array: Any) -> None:
    """Add the name, type, shape and values of an array to a hash of `hashlib`."""
    array = to_host(array)
    digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def is_on_gpu(array: Any) -> bool:
    """Return whether an array lies on a GPU; its library must have the CUDA array interface or speak DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA


class _Pointed:
    """The memory on a GPU of an object that has an address, a shape and a type, with the CUDA array interface."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        dtype = np.dtype(getattr(owner.dtype, "name", owner.dtype))  # Polygraphy's types have NumPy's names
        self.__cuda_array_interface__ = {
            "data": (int(owner.ptr), False), "shape": tuple(owner.shape), "typestr": dtype.str, "version": 3,
            "stream": 1,
        }  # fmt: skip


def with_interface(values: Any) -> Any:
    """Return `values`, or an array over its GPU memory if it has no interface but `ptr`, `shape` and `dtype`.

    Polygraphy's `DeviceView` and `DeviceArray` are such objects; CUDA's default stream fills them.
    """
    interfaces = ("__array__", "__array_interface__", "__dlpack__", "__cuda_array_interface__")
    if any(hasattr(values, name) for name in interfaces):
        return values
    return _Pointed(values) if all(hasattr(values, name) for name in ("ptr", "shape", "dtype")) else values


def type_of(array: Any) -> np.dtype[Any]:
    """Return the type of any library's array as a NumPy type."""
    is_cuda = hasattr(array, "__cuda_array_interface__")
    found: np.dtype[Any] = np.dtype(array.__cuda_array_interface__["typestr"] if is_cuda else np.asarray(array).dtype)
    return found


def as_cupy(array: Any) -> Any:
    """Return any library's array on a GPU as a CuPy array over the same memory, once it is filled."""
    try:
        import cupy
    except ImportError as error:
        raise UnavailableError(
            f"a {type(array).__name__} lies on a GPU, and CuPy, which reads it, is not installed: {CUPY}", "CuPy"
        ) from error
    if hasattr(array, "__cuda_array_interface__"):
        address = array.__cuda_array_interface__["data"][0]  # an array without elements may have none
        device = cupy.cuda.runtime.pointerGetAttributes(address).device if address else None
        with cupy.cuda.Device(device):  # if another device is current, CuPy copies the array there
            imported = cupy.asarray(array)
            wait_until_filled(array)
        return imported
    imported = cupy.from_dlpack(array)  # CuPy's current stream waits for the array
    with imported.device:
        cupy.cuda.get_current_stream().synchronize()
    return imported


def copied(array: Any) -> Any:
    """Return a copy of an array in the same memory, NumPy's or CuPy's."""
    if hasattr(array, "__cuda_array_interface__"):
        return as_cupy(array).copy()
    return np.array(array)


def completed(array: Any, first: Any, size: int) -> Any:
    """Return an array with so many elements, those that it lacks from `first`; both lie in the same memory."""
    missing = size - array.shape[0]
    if isinstance(first, np.ndarray):
        return np.concatenate([array, np.resize(first, (missing, *first.shape[1:]))])
    import cupy

    whole = cupy.concatenate([as_cupy(array), first[cupy.arange(missing) % len(first)]])
    cupy.cuda.get_current_stream().synchronize()
    return whole


def upload(array: Any, name: str, kept: dict[str, Any]) -> Any:
    """Wait for a copy of a NumPy array on CuPy's current GPU; `kept` has the last one of each name, to be reused."""
    import cupy

    array = np.asarray(array, order="C")  # ascontiguousarray would add a dimension to a number
    target = kept.get(name)
    if target is None or (target.shape, target.dtype) != (array.shape, array.dtype):
        target = kept[name] = cupy.empty(array.shape, array.dtype)
    target.set(array)
    cupy.cuda.get_current_stream().synchronize()
    return target


def wait_until_filled(array: Any) -> None:
    """Wait until another library has filled its array on the current GPU.

    From version 3 on, the CUDA array interface names the stream to wait for. If it does not (as in PyTorch), DLPack has
    the library make CuPy's current stream wait for the library's stream. If an array has neither, it is assumed to be
    filled on CUDA's default stream.
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
