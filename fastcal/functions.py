"""A model's local functions, inlined with the names that TensorRT's parser gives the tensors within."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import onnx
import onnx.inliner

from fastcal.graph import nodes_within, subgraphs

#: The functions of a model by domain, name and overload.
_Functions = Mapping[tuple[str, str, str], onnx.FunctionProto]


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose calls of local functions are replaced by the functions' nodes, nested calls too.

    TensorRT's parser inlines functions as well: a tensor within keeps its name, or gets a number if the name is taken.
    Measured on the parser of TensorRT for RTX 1.7: one counter numbers the names of layers and of tensors that are
    taken, and every call registers its outputs' names within the function too. The numbers are TensorRT's as long as
    its parser makes one layer of each node.
    """
    if not model.functions:
        return model
    typed = onnx.shape_inference.infer_shapes(model)  # the inliner converts operators of other versions by their types
    inlined = onnx.inliner.inline_local_functions(typed, convert_version=True)
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    expanded = list(_expand(model.graph.node, functions, {}))
    if len(expanded) == len(inlined.graph.node):  # else a function's operators were converted to another version
        rename(inlined.graph, new_names(inlined.graph, expanded))
    return inlined


def _expand(
    nodes: Sequence[onnx.NodeProto], functions: _Functions, outer: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the name of every node after inlining, and each output's name within the innermost function outwards."""
    for node in nodes:
        chains = [[name, *outer.get(name, ())] for name in node.output]
        function = functions.get((node.domain, node.op_type, node.overload))
        if function is None:
            yield node.name or "node_of_" + next(iter(node.output), ""), chains
        else:
            yield from _expand(function.node, functions, dict(zip(function.output, chains, strict=False)))


def new_names(graph: onnx.GraphProto, expanded: Sequence[tuple[str, list[list[str]]]]) -> dict[str, str]:
    """Return TensorRT's names of an inlined graph's tensors by their names so far; the graph's own ends keep theirs."""
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    layers: set[str] = set()
    tensors = kept | {name for node in nodes_within(graph.node) for name in node.output}
    numbers = count()

    def register(name: str, taken: set[str]) -> str:
        unique = name
        while unique in taken:
            unique = f"{name}_{next(numbers)}"
        taken.add(unique)
        return unique

    names = {}
    for node, (layer, chains) in zip(graph.node, expanded, strict=True):
        register(layer, layers)
        for output, chain in zip(node.output, chains, strict=True):
            new = [register(name, tensors) for name in chain if name]
            if output and output not in kept:
                names[output] = new[-1]
    return names


def rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors of a graph, also where its subgraphs read them."""
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
        for inner in subgraphs(node):
            rename(inner, names)
    for value in (*graph.value_info, *graph.output):
        value.name = names.get(value.name, value.name)
