"""The noise of rounding to INT8: a loop over every element, compiled for the CPU with numba."""

import numpy as np

from fastcal.observe.count import compile_loop


def _rounded(values, scale):  # type: ignore[no-untyped-def]
    """Return the noise of a vector's Q/DQ with a `scale` > 0: the sum of squares, and how many are clipped."""
    noise = 0.0
    clipped = 0
    for i in range(values.size):
        step = np.rint(values[i] / scale)  # half to even
        lost = values[i] - min(max(step, np.float32(-128)), np.float32(127)) * scale
        noise += np.float64(lost) * np.float64(lost)
        clipped += abs(values[i]) > np.float32(127) * scale
    return noise, clipped


rounded = compile_loop(_rounded, "Tuple((float64, int64))(float32[::1], float32)", fastmath={"reassoc"})
