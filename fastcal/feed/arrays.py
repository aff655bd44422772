"""`ArrayFeed`: arrays that the caller has or makes, copied into the feed's buffers ahead of the consumer."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastcal.batch import counting
from fastcal.definition import Network
from fastcal.device import resolve
from fastcal.errors import DataError
from fastcal.feed.array_plan import ArrayPasses, ArrayPlan, is_source, iterable
from fastcal.feed.chunks import LAST_BATCHES
from fastcal.feed.feed import Feed
from fastcal.feed.plan import PlannedFeed, check_settings
from fastcal.model import Model


class ArrayFeed(PlannedFeed):
    """Batches that the caller has or makes, copied into buffers that are filled and read in turn.

    A background thread goes through the batches and copies the next one while the consumer works on the last. On a
    GPU, arrays in host memory are copied through pinned memory; arrays on the GPU do not leave it.

    Args:
        batches: A list of batches; or anything that is iterated over to get them, a PyTorch `DataLoader` for instance;
            or a DALI pipeline, run for one epoch of its reader or until its sources end; or a function that returns
            one of these, called for every pass. Every pass must give the same batches, so nothing may shuffle. A
            generator gives one pass.

            A batch is a dict of arrays, a tuple or list of them, or one array; the first dimension counts samples.
            Arrays are NumPy's, CuPy's, PyTorch's, Polygraphy's, or any that speak DLPack or the CUDA array interface;
            a plain integer, which may be a device address, is rejected. The work that
            makes an array on a GPU must have been enqueued on the current stream of the array's library. float64
            becomes float32, other types of numbers stay.
        names: The network's inputs. A sequence names the first arrays of a tuple, and the arrays after them (labels,
            for instance) are left out; of a dict, it selects the arrays that are inputs. A dict gives the input for a
            key or a position: `{"pixel_values": "input"}`, `{1: "input"}`. By default all arrays of a dict go by their
            keys, and of any other batch the first array goes to whatever single input a network has.
        model: The network, an ONNX file. It gives the names of the inputs, if `names` does not. And its inputs may have
            unlike first dimensions: one that is fixed in the model, or has another name there, counts no samples.
        last_batch: A last batch of fewer samples is completed with the first ones ("wrap"), left out ("drop"), or
            handed on as it is ("keep"). With "keep" the other batches may be of any size, too.
        device: The place of the buffers: "auto" (a GPU if there is one and CuPy is installed, else the CPU), "cpu",
            "cuda" or "cuda:N".
        depth: The number of buffers, at least 2.

    Attributes:
        batch_size: The number of samples in the first batch; reading it begins a pass.
        gpu: The number of the GPU that the batches lie on; None for host memory.

    Raises:
        DataError: There are no batches to get from `batches`, or `names` are no names. In a pass: a batch fits neither
            the names nor the batches before it, or there is none. Exceptions of the caller's code pass unchanged.
        FastcalError: A setting is out of its range.
        UnavailableError: There is no such device.
    """

    def __init__(
        self,
        batches: Any,
        names: Sequence[str] | Mapping[Any, str] | None = None,
        *,
        model: str | os.PathLike[str] | Model | None = None,
        last_batch: str = "wrap",
        device: str = "auto",
        depth: int = 2,
    ) -> None:
        if not is_source(batches):
            raise DataError(
                f"ArrayFeed takes a list of batches, a loader or a DALI pipeline, not a {type(batches).__name__}; for "
                "files there are ImageFeed and NumpyFeed"
            )
        if isinstance(names, str) or not isinstance(names, Sequence | Mapping | None):
            raise DataError(f"names is {names!r}; give a list of the inputs' names, or a dict")
        check_settings(last_batch, LAST_BATCHES, depth=depth)
        network = None if model is None else Model.of(model)
        if names is None and network is not None:
            names = network.input_names
        counts = None if network is None else counting(network.inputs)
        plan = ArrayPlan(iterable(batches), names, last_batch, resolve(device), depth, counting=counts)
        super().__init__(plan, ArrayPasses)


def as_feed(batches: Any, network: Network | None, device: str) -> AbstractContextManager[Feed]:
    """Return `batches` itself if it is a feed, which stays open; else an `ArrayFeed` of batches of any size."""
    if isinstance(batches, Feed):
        return nullcontext(batches)
    if network is None or isinstance(network, Model):
        return ArrayFeed(batches, model=network, last_batch="keep", device=device)
    return ArrayFeed(batches, network.input_names or None, last_batch="keep", device=device)
