"""The caller's own DALI pipeline as batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline
from nvidia.dali.backend import TensorListGPU

from fastcal.device import as_cupy
from fastcal.errors import DataError


class Epochs:
    """The epochs of a pipeline not run yet. Every iteration runs one and yields its outputs, each valid until the next.

    If the pipeline has a reader, an epoch is the reader's shard; else it ends when the pipeline's sources end.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        readers = pipeline.reader_meta()
        sizes = {_shard_size(reader) for reader in readers.values()}
        if len(sizes) > 1:
            named = ", ".join(f"{name!r} {_shard_size(reader)}" for name, reader in readers.items())
            raise DataError(f"the pipeline's readers have epochs of different sizes: {named} samples")
        self._samples = sizes.pop() if sizes else None
        #: Whether an epoch's last batch ends the readers' shards, and is not the next epoch's beginning too.
        self._ends_even = all(
            (reader["pad_last_batch"] or not self._samples % pipeline.max_batch_size)
            and (reader["stick_to_shard"] or reader["number_of_shards"] == 1)
            for reader in readers.values()
        )
        self._at_beginning = True

    def __length_hint__(self) -> int:
        return NotImplemented if self._samples is None else -(-self._samples // self._pipeline.max_batch_size)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        if not self._at_beginning:
            raise DataError(
                "the pipeline stands in the middle of an epoch, and a pass must begin at its beginning; give ArrayFeed "
                "the function that makes the pipeline, so that every pass has its own"
            )
        self._at_beginning = False
        size, left = self._pipeline.max_batch_size, self._samples
        while left is None or left > 0:
            try:
                outputs = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                self._at_beginning = True
                return
            yield _Outputs(outputs, left)
            left = None if left is None else left - size
        self._at_beginning = self._ends_even


def _shard_size(reader: Any) -> int:
    """Return the number of samples of a reader in an epoch; DALI's shards differ by at most one."""
    size, shards, shard = reader["epoch_size"], reader["number_of_shards"], reader["shard_id"]
    return int(size * (shard + 1) // shards - size * shard // shards)


class _Outputs(Sequence[Any]):
    """The outputs of a run. Each becomes one array when it is asked for; the others may have any shape."""

    def __init__(self, outputs: Sequence[Any], most: int | None) -> None:
        self._outputs = outputs
        self._most = most

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index: Any) -> Any:
        output = self._outputs[index]
        if not output.is_dense_tensor():
            shapes = sorted(set(output.shape()))
            raise DataError(
                f"output {index} of the pipeline has samples of different shapes, {shapes[0]} and {shapes[-1]}; make "
                "them one shape in the pipeline (resize, crop or pad)"
            )
        tensor = output.as_tensor()
        array = as_cupy(tensor) if isinstance(output, TensorListGPU) else np.asarray(tensor)
        return array[: self._most]
