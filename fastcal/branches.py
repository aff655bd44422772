"""An If whose condition is a constant, replaced by the nodes of the branch that it takes, as TensorRT's parser does."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fastcal.functions import new_names, rename
from fastcal.graph import constants_of, graphs_within, reads, subgraphs

#: A node after inlining: its name before, and each output's name within the innermost branch outwards.
_Origin = tuple[str, list[list[str]]]


def inline_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which the branch that is taken replaces each If with a constant condition, nested ones too.

    Ifs in the body of a Loop or a Scan, or in a branch that depends on the inputs, stay. Tensors get the names that
    TensorRT's parser gives them: it numbers those that are taken as it does within local functions.
    """
    if not any(node.op_type == "If" for node in model.graph.node):
        return model
    inlined = onnx.ModelProto()
    inlined.CopyFrom(model)
    inliner = _Inliner(inlined)
    inlined.graph.ClearField("node")
    origins = []
    for node, origin in inliner.expand(model.graph.node, None, {}):
        inlined.graph.node.append(node)
        origins.append(origin)
    if not inliner.conditions:
        return model
    _drop_unread(inlined.graph, inliner.conditions)
    rename(inlined.graph, new_names(inlined.graph, origins))
    return inlined


class _Inliner:
    """Goes through a model's nodes in order, and keeps what conditions may be computed from.

    Attributes:
        conditions: The conditions of the Ifs that were replaced.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.conditions: set[str] = set()
        self._graph, self._opsets = model.graph, model.opset_import
        graphs = graphs_within(model.graph.node)
        self._names = Counter(
            chain(*map(_defined, (model.graph, *graphs)), (value.name for value in model.graph.input))
        )
        self._labels = Counter(node.name for node in model.graph.node)
        self._producers: dict[str, onnx.NodeProto] = {}

    def expand(
        self, nodes: Iterable[onnx.NodeProto], within: Mapping[str, str] | None, outer: Mapping[str, Sequence[str]]
    ) -> Iterator[tuple[onnx.NodeProto, _Origin]]:
        """Yield nodes, those of branches in the place of their Ifs.

        `within` has the new names of a branch's tensors, None for the graph itself; `outer` has the names that the
        branch's outputs have in the graphs around.
        """
        names = within or {}
        for original in nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if within is not None and node.name:
                node.name = _unique(node.name, self._labels)
            for ends in (node.input, node.output):
                ends[:] = [names.get(name, name) for name in ends]
            for inner in subgraphs(node):
                rename(inner, names)
            chains = [[name, *outer.get(name, ())] for name in original.output]
            branch = self._taken(node)
            if branch is not None:
                self.conditions.add(node.input[0])
                yield from self._branch(branch, node.output, chains)
                continue
            self._producers.update(dict.fromkeys(node.output, node))
            yield node, (original.name or "node_of_" + next(iter(original.output), ""), chains)

    def _branch(
        self, branch: onnx.GraphProto, outputs: Sequence[str], chains: Sequence[Sequence[str]]
    ) -> Iterator[tuple[onnx.NodeProto, _Origin]]:
        """Yield the nodes of a branch, whose outputs become those of its If."""
        computed = {name for node in branch.node for name in node.output}
        ends: dict[str, str] = {}
        copied: list[tuple[str, str]] = []
        outer: dict[str, Sequence[str]] = {}
        for value, output, around in zip(branch.output, outputs, chains, strict=False):
            if value.name in computed and value.name not in ends:
                ends[value.name], outer[value.name] = output, around
            else:  # a constant, or an output that is there twice
                copied.append((value.name, output))
        names = {name: ends.get(name, name) for name in _defined(branch)}
        for name in names.keys() - ends.keys():
            if self._names[name] > 1:  # in another graph, too
                names[name] = _unique(name, self._names)
        for tensor in branch.initializer:
            constant = self._graph.initializer.add()
            constant.CopyFrom(tensor)
            constant.name = names[tensor.name]
        yield from self.expand(branch.node, names, outer)
        for name, output in copied:
            node = helper.make_node("Identity", [names.get(name, name)], [output])
            yield node, (f"node_of_{output}", [[output]])

    def _taken(self, node: onnx.NodeProto) -> onnx.GraphProto | None:
        """Return the branch that an If takes; None if its condition depends on the inputs, or for another node."""
        branches = {value.name: value.g for value in node.attribute if value.HasField("g")}
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or len(branches) != 2 or not node.input:
            return None
        condition = self._constant(node.input[0])
        return None if condition is None else branches.get("then_branch" if condition else "else_branch")

    def _constant(self, name: str) -> bool | None:
        """Return the value of a condition that depends on no input; None for another one."""
        stored = {tensor.name: tensor for tensor in self._graph.initializer}
        needed, leaves, unread = [], set(), [name]
        while unread:
            current = unread.pop()
            if current in self._producers:
                needed.append(self._producers[current])
                unread += reads(self._producers[current])
            elif current in stored:
                leaves.add(current)
            else:
                return None
        try:
            value = onnx.ValueInfoProto(name=name)
            graph = helper.make_graph(needed[::-1], "condition", [], [value], [stored[leaf] for leaf in leaves])
            if not needed:
                return bool(np.all(numpy_helper.to_array(stored[name])))
            found: Any = ReferenceEvaluator(helper.make_model(graph, opset_imports=self._opsets)).run(None, {})
            return bool(np.all(found[0]))
        except Exception:  # an operator is unknown, or its inputs are not valid: the backend decides
            return None


def _unique(name: str, taken: Counter[str]) -> str:
    """Return a name like `name` that is not taken, and count it."""
    unique, number = name, 0
    while taken[unique]:
        unique, number = f"{name}_branch_{number}", number + 1
    taken[unique] += 1
    return unique


def _drop_unread(graph: onnx.GraphProto, names: set[str]) -> None:
    """Drop the constants of these names that no node reads any more."""
    read = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in names]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _defined(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the tensors that a graph's own nodes compute, and of its constants."""
    return {name for node in graph.node for name in node.output if name} | constants_of(graph)
