"""External data: tensors of a model that lie in files beside it, found, identified, read and written here."""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from fastcal.errors import ModelError
from fastcal.graph import subgraphs

#: Tensors in a file begin at multiples of this, so that a reader may map them into memory.
_ALIGNMENT = 4096

#: Smaller tensors stay in the model's own file, since readers look into them for shapes.
_SMALL = 1024

#: The bytes that are hashed at a time.
_CHUNK = 1 << 20


def tensors_in(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield all stored tensors of a graph: initializers, sparse ones, those of attributes, and those of subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for value in node.attribute:
            yield from ([value.t] if value.HasField("t") else [])
            yield from value.tensors
            for sparse in (*([value.sparse_tensor] if value.HasField("sparse_tensor") else []), *value.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        for inner in subgraphs(node):
            yield from tensors_in(inner)


class ExternalData:
    """The external data of a model: of the tensors of `graph`, in files named relative to `folder`.

    Links are followed, as ONNX Runtime does for a model that it reads from a file. The locations in the graph are
    replaced by those of the real files, relative to `root`, so that ONNX Runtime finds them for any variant of it.

    Attributes:
        files: The paths of the files as the model names them, in alphabetical order.
        root: The folder that all real files lie below.

    Raises:
        ModelError: A location leads out of the folder, or is no path.
    """

    def __init__(self, graph: onnx.GraphProto, folder: Path, label: str) -> None:
        self._label = label
        tensors = [tensor for tensor in tensors_in(graph) if is_external(tensor)]
        locations = sorted({_entries(tensor).get("location", "") for tensor in tensors})
        for location in locations:
            path = PurePosixPath(location)
            if path.is_absolute() or ".." in path.parts or "\0" in location:
                raise ModelError(f"{label} has external data outside its folder: {location}; keep it beside the model")
        self.files = [folder / location for location in locations]
        real = {location: Path(os.path.realpath(folder / location)) for location in locations}
        self.root = Path(os.path.commonpath([path.parent for path in real.values()] or [folder.resolve()]))
        for tensor in tensors:
            entries = _entries(tensor)
            entries["location"] = str(real[entries.get("location", "")].relative_to(self.root))
            _set_entries(tensor, entries)
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of the files' contents, one after the other; empty if there are none."""
        return b"".join(map(self._hash, self.files))

    def _hash(self, path: Path) -> bytes:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise self._missing(path, error) from error
        return digest.digest()

    def _missing(self, path: Path, error: OSError) -> ModelError:
        return ModelError(f"cannot load {self._label}: {path.name}: {error.strerror}; keep its external data beside it")

    def bytes_of(self, tensor: onnx.TensorProto) -> Any:
        """Return the content of a stored tensor, a buffer; external data is mapped into memory, not read."""
        if not is_external(tensor):
            return tensor.raw_data
        entries = _entries(tensor)
        content = self._map(entries["location"])
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", content.size - offset))
        except ValueError:
            offset = length = -1
        if offset < 0 or length < 0 or offset + length > content.size:
            raise ModelError(
                f"{self._label}: the external data of {tensor.name!r} is not within {entries['location']}; copy the "
                "file again, or export the network again"
            )
        return content[offset : offset + length]

    def _map(self, location: str) -> npt.NDArray[np.uint8]:
        if location not in self._maps:
            path = self.root / location
            try:
                size = path.stat().st_size
                self._maps[location] = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
            except OSError as error:
                raise self._missing(path, error) from error
        return self._maps[location]

    def array(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """Return the value of a stored tensor, external data as a view of the file.

        Raises:
            ModelError: The file is missing, or the tensor's size is not that of its type and shape.
        """
        try:
            if not is_external(tensor):
                return numpy_helper.to_array(tensor)
            content = self.bytes_of(tensor)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if content.size == dtype.itemsize * int(np.prod(tensor.dims, dtype=np.int64)):
                return np.frombuffer(content, dtype).reshape(tensor.dims)  # type: ignore[no-any-return]
            return numpy_helper.to_array(self.loaded(tensor))  # several values in a byte
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{self._label} is not a valid ONNX model: {tensor.name!r} does not hold the values of its type and "
                "shape; export the network again"
            ) from error

    def loaded(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """Return a copy of a stored tensor that holds its content itself."""
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        if is_external(tensor):
            copy.raw_data = bytes(self.bytes_of(tensor))
            copy.ClearField("data_location")
            copy.ClearField("external_data")
        return copy

    def load(self, graph: onnx.GraphProto) -> None:
        """Put the external data into a graph, a variant of the one that it belongs to."""
        for tensor in tensors_in(graph):
            if is_external(tensor):
                tensor.CopyFrom(self.loaded(tensor))

    def size(self, graph: onnx.GraphProto) -> int:
        """Return the bytes that the stored tensors of a graph take together."""
        return sum(len(self.bytes_of(tensor)) or tensor.ByteSize() for tensor in tensors_in(graph))

    def move(self, graph: onnx.GraphProto, location: str, file: BinaryIO) -> None:
        """Write all but the small tensors of a graph to a file, and let the graph refer to that as `location`."""
        for tensor in tensors_in(graph):
            content = self.bytes_of(tensor)
            if len(content) < _SMALL and not is_external(tensor):
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            entries = {"location": location, "offset": str(file.tell()), "length": str(len(content))}
            file.write(content)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            _set_entries(tensor, entries)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Return True if a tensor's content lies in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _set_entries(tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    tensor.ClearField("external_data")
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
