"""The start of CUDA ahead of its use: it takes most of a second, in which Python imports what it needs."""

import ctypes
import os
import threading


def wake_gpu() -> None:
    """Begin to start CUDA on the first GPU in a thread, if there is a driver."""
    widen_queues()
    threading.Thread(target=_wake, name="fastcal-wake").start()


def widen_queues() -> None:
    """Have CUDA use 32 hardware queues instead of 8, unless the environment says otherwise or CUDA has started.

    nvJPEG has a hundred streams. If one of them shares a queue with a network's stream, it waits for the network.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _wake() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # the one that CuPy and the others share
