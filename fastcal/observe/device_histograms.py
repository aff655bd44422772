"""The histograms of `fastcal.observe.histogram`, counted on a GPU: the same counts, bin for bin."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from fastcal.observe.histogram import BINS, Histogram

#: The elements that one block of threads counts, and its threads.
_TILE = 1 << 17
_THREADS = 512

#: A float's exponents from that of the least subnormal on, and one more for a range beyond all floats.
_LEAST_EXPONENT = -149
_EXPONENTS = 128 - _LEAST_EXPONENT + 1

#: The number of sets of arrays that are remembered: a feed's buffers and a network's outputs recur.
_TABLES = 64

_DEFINES = {"THREADS": _THREADS, "TILE": _TILE, "EXPONENTS": _EXPONENTS, "LEAST_EXPONENT": f"({_LEAST_EXPONENT})"}

# `count` counts every element of a batch into bins of the range so far, and finds the batch's amax. If the amax exceeds
# the range (as in the first batch), `settle` widens the range and asks for a second pass, which counts again; else
# `settle` adds the counts to those of earlier batches. A tile belongs to one tensor, so one launch serves all tensors.
_SOURCE = r"""
typedef unsigned long long u64;
const int BINS = 2048;

// The value of a positive float's bits. CuPy has the compiler flush subnormal floats to zero, but not doubles.
__device__ double value_of(unsigned bits) {
    return bits >> 23 ? (double)__uint_as_float(bits) : bits * 0x1p-149;
}

// The width of a bin: range / BINS, rounded to float.
__device__ double width_of(double range) {
    const double width = range / BINS;
    return width < 0x1p-126 ? rint(width * 0x1p149) * 0x1p-149 : (float)width;
}

// The place, in a table with a row per tensor, of the number of elements that were clamped at this range.
__device__ u64* place_of(u64* clamped, int row, double range) {
    return &clamped[(size_t)row * EXPONENTS + (ilogb(range) - LEAST_EXPONENT)];
}

// The bin of a positive float: floor(x / width), the quotient rounded to the nearest float as CPUs round it, at most
// BINS, which only an x equal to the range reaches.
struct Divider {
    const float width, reciprocal;

    __device__ Divider(double w) : width((float)w), reciprocal(__frcp_rn((float)w)) {}

    // Two steps of refinement give the correctly rounded quotient (Markstein), unless something under- or overflows, or
    // the mantissa is all ones.
    __device__ bool is_exact() const {
        return width > 1e-27f && width < 1e27f && (__float_as_uint(width) & 0x7fffff) != 0x7fffff;
    }

    __device__ unsigned bin(unsigned bits) const {
        const float x = __uint_as_float(bits);
        float quotient = x * reciprocal;
        quotient = fmaf(fmaf(-quotient, width, x), reciprocal, quotient);
        quotient = fmaf(fmaf(-quotient, width, x), reciprocal, quotient);
        return min((unsigned)quotient, (unsigned)BINS);
    }
};

struct SlowDivider {
    const double width;

    __device__ unsigned bin(unsigned bits) const {
        if (width == 0) return 0;
        const float quotient = (float)(value_of(bits) / width);  // rounding twice does no harm from a double
        return min((unsigned)quotient, (unsigned)BINS);
    }
};

__device__ void add(u64* place, u64 value) {
    if (value) atomicAdd(place, value);
}

__device__ u64 sum_of_warp(u64 value) {
    for (int other = 16; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
    return value;
}

// A thread's findings; elements that are neither zero nor NaN nor infinite are counted in `bins`.
struct Found {
    unsigned amax = 0, zeros = 0, nan = 0, inf = 0;

    template <class Divider>
    __device__ void take(float value, const Divider& divider, unsigned* bins) {
        const unsigned bits = __float_as_uint(value) & 0x7fffffff;
        if (bits >= 0x7f800000) {
            nan += bits > 0x7f800000;
            inf += bits == 0x7f800000;
            return;
        }
        amax = max(amax, bits);  // bits of positive floats are in the floats' order
        if (bits == 0)
            zeros++;
        else
            atomicAdd(&bins[divider.bin(bits)], 1);
    }

    template <class Divider>
    __device__ void take_all(const float* values, int size, const Divider& divider, unsigned* bins) {
        int done = 0;
        if ((u64)values % sizeof(float4) == 0) {
            const float4* quads = (const float4*)values;
            #pragma unroll 4
            for (int quad = threadIdx.x; quad < size / 4; quad += THREADS) {
                const float4 four = __ldcs(quads + quad);
                take(four.x, divider, bins);
                take(four.y, divider, bins);
                take(four.z, divider, bins);
                take(four.w, divider, bins);
            }
            done = size / 4 * 4;
        }
        for (int rest = done + threadIdx.x; rest < size; rest += THREADS) take(values[rest], divider, bins);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) count(
    const u64* addresses, const long long* sizes, const int* rows,
    const int* tile_tensors, const long long* tile_starts, const double* ranges, const int* again,
    unsigned* batch_amaxes, u64* nans, u64* infs, u64* counts, u64* clamped, int second
) {
    const int tensor = tile_tensors[blockIdx.x], row = rows[tensor];
    if (second && !again[row]) return;
    __shared__ unsigned bins[BINS + 1];
    for (int bin = threadIdx.x; bin <= BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();

    const float* values = (const float*)addresses[tensor] + tile_starts[blockIdx.x];
    const int size = (int)min((long long)TILE, sizes[tensor] - tile_starts[blockIdx.x]);
    const double width = width_of(ranges[row]);
    const Divider divider(width);
    Found found;
    if (divider.is_exact())
        found.take_all(values, size, divider, bins);
    else
        found.take_all(values, size, SlowDivider{width}, bins);

    for (int other = 16; other; other /= 2) found.amax = max(found.amax, __shfl_xor_sync(~0u, found.amax, other));
    const u64 zeros = sum_of_warp(found.zeros), nan = sum_of_warp(found.nan), inf = sum_of_warp(found.inf);
    if (threadIdx.x % 32 == 0) {
        add(&counts[(size_t)row * BINS], zeros);
        if (!second) {
            atomicMax(&batch_amaxes[row], found.amax);
            add(&nans[row], nan);
            add(&infs[row], inf);
        }
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) add(&counts[(size_t)row * BINS + bin], bins[bin]);
    if (threadIdx.x == 0 && bins[BINS]) {
        add(&counts[(size_t)row * BINS + BINS - 1], bins[BINS]);
        add(second ? place_of(clamped, row, ranges[row]) : &clamped[row], bins[BINS]);
    }
}

extern "C" __global__ void __launch_bounds__(BINS / 2) settle(
    const int* rows, double* ranges, unsigned* amaxes, unsigned* batch_amaxes,
    u64* batch_counts, u64* counts, u64* batch_clamped, u64* clamped, int* again
) {
    const int row = rows[blockIdx.x], low = threadIdx.x, high = low + BINS / 2;
    const double batch_amax = value_of(batch_amaxes[row]);
    double range = ranges[row];
    u64 *mine = counts + (size_t)row * BINS, *batch = batch_counts + (size_t)row * BINS;
    const bool widen = batch_amax > range;
    if (!widen) {
        mine[low] += batch[low];
        mine[high] += batch[high];
    } else if (range == 0) {
        range = BINS * width_of(batch_amax);  // the same, unless the width is rounded: to 0 perhaps
    }
    while (range != 0 && batch_amax > range) {
        const u64 pair = mine[2 * low] + mine[2 * low + 1];
        __syncthreads();
        mine[low] = pair;
        mine[high] = 0;
        __syncthreads();
        range *= 2;
    }
    batch[low] = batch[high] = 0;
    __syncthreads();
    if (low == 0) {
        if (!widen && batch_clamped[row]) *place_of(clamped, row, range) += batch_clamped[row];
        batch_clamped[row] = 0;
        ranges[row] = range;
        amaxes[row] = max(amaxes[row], batch_amaxes[row]);
        batch_amaxes[row] = 0;
        again[row] = widen;
    }
}
"""


class _Totals(NamedTuple):
    """The histograms of all tensors, a row per tensor; amaxes are the bits of floats."""

    ranges: Any
    amaxes: Any
    nans: Any
    infs: Any
    counts: Any
    clamped: Any


class _Batch(NamedTuple):
    """The counts of one batch, a row per tensor; `again` tells which exceed the range."""

    amaxes: Any
    counts: Any
    clamped: Any
    again: Any


class DeviceHistograms:
    """Histograms by tensor name, on the GPU that is current when they are made; only `fetch` waits for the GPU."""

    def __init__(self, names: Sequence[str]) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        module = cupy.RawModule(
            code=_SOURCE, options=(*(f"-D{name}={value}" for name, value in _DEFINES.items()), "--std=c++17"),
            backend="nvrtc",
        )  # fmt: skip
        self._count, self._settle = module.get_function("count"), module.get_function("settle")
        tensors = max(len(self._rows), 1)

        def zeros(dtype: Any, *columns: int) -> Any:
            return cupy.zeros((tensors, *columns), dtype)

        u4, u8 = np.uint32, np.uint64
        self._totals = _Totals(zeros("f8"), zeros(u4), zeros(u8), zeros(u8), zeros(u8, BINS), zeros(u8, _EXPONENTS))
        self._batch = _Batch(zeros(u4), zeros(u8, BINS), zeros(u8), zeros(np.int32))
        self._starts = np.zeros(tensors)
        self._tables: dict[tuple[tuple[str, int, int], ...], tuple[Any, ...]] = {}
        cupy.cuda.get_current_stream().synchronize()

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew, on CuPy's current stream, with these ranges by tensor name."""
        self._starts[: len(self._rows)] = [starts.get(name, 0.0) for name in self._rows]
        for array in self._totals:
            array.fill(0)
        self._totals.ranges.set(self._starts)

    def update_all(self, activations: Mapping[str, Any]) -> None:
        """Count contiguous float32 arrays of some of the tensors, on CuPy's current stream."""
        key = tuple((name, array.data.ptr, array.size) for name, array in activations.items() if array.size)
        if not key:
            return
        if key not in self._tables:
            if len(self._tables) == _TABLES:  # the arrays are new with every batch
                self._tables.clear()
            self._tables[key] = self._table(key)
        rows, tile_tensors, tile_starts, addresses, sizes = self._tables[key]
        totals, batch = self._totals, self._batch

        def count(into: Any, clamped_into: Any, second: bool) -> None:
            self._count(
                (tile_tensors.size,), (_THREADS,),
                (addresses, sizes, rows, tile_tensors, tile_starts, totals.ranges, batch.again, batch.amaxes,
                 totals.nans, totals.infs, into, clamped_into, np.int32(second)),
            )  # fmt: skip

        count(batch.counts, batch.clamped, second=False)
        self._settle(
            (rows.size,), (BINS // 2,),
            (rows, totals.ranges, totals.amaxes, batch.amaxes, batch.counts, totals.counts, batch.clamped,
             totals.clamped, batch.again),
        )  # fmt: skip
        count(totals.counts, totals.clamped, second=True)

    def _table(self, key: tuple[tuple[str, int, int], ...]) -> tuple[Any, ...]:
        """Return each tensor's row, each tile's tensor and first element, and each tensor's address and size."""
        sizes = np.array([size for _, _, size in key], np.int64)
        tiles = -(-sizes // _TILE)
        tensors = np.repeat(np.arange(len(key), dtype=np.int32), tiles)
        starts = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * _TILE
        rows = np.array([self._rows[name] for name, _, _ in key], np.int32)
        addresses = np.array([address for _, address, _ in key], np.uint64)
        return tuple(cupy.asarray(values) for values in (rows, tensors, starts.astype(np.int64), addresses, sizes))

    def fetch(self) -> dict[str, Histogram]:
        """Return the histograms so far, in host memory, after waiting for CuPy's current stream."""
        ranges, amaxes, nans, infs, counts, clamped = map(cupy.asnumpy, self._totals)
        histograms = {}
        for name, row in self._rows.items():
            histogram = histograms[name] = Histogram(float(self._starts[row]))
            histogram.counts[:] = counts[row]
            histogram.range, histogram.amax = float(ranges[row]), float(amaxes.view(np.float32)[row])
            histogram.nan, histogram.inf = int(nans[row]), int(infs[row])
            for exponent in np.flatnonzero(clamped[row]):
                # The range of that time is today's times a power of two.
                mantissa = math.frexp(histogram.range)[0]
                then = math.ldexp(mantissa, int(exponent) + _LEAST_EXPONENT + 1)
                histogram.clamped[then] = int(clamped[row, exponent])
        return histograms
