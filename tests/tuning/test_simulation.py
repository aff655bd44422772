import numpy as np
import onnx
import onnxruntime
import pytest

from conftest import DIGITS
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.rounded import Rounded
from fastcal.tuning.simulation import Simulation

RANDOM = np.random.default_rng(3)

#: A residual block, a grouped convolution, a product of two activations, a Gemm of transposed weights.
VARIED = """
net (float[N, 4, 8, 8] x) => (float[N, 5] y, float[N, 8, 8] z) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(r, w2)
    s = Add(c, x)
    g = Conv<group = 2>(s, w3)
    t = Transpose<perm = [0, 2, 3, 1]>(g)
    f = Reshape(t, rows)
    u = Transpose<perm = [0, 2, 1]>(f)
    z = MatMul(u, f)
    m = GlobalAveragePool(g)
    n = Flatten(m)
    y = Gemm<transB = 1>(n, w4, b4)
}
"""
CONSTANTS = {
    name: RANDOM.standard_normal(shape).astype("f4")
    for name, shape in {
        "w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "w3": (8, 2, 1, 1), "w4": (5, 8), "b4": (5,),
    }.items()
} | {"rows": np.array([0, 64, 8], np.int64)}  # fmt: skip


@pytest.fixture
def varied(onnx_file):
    return Model(onnx_file(VARIED, CONSTANTS))


def scales_of(model, batch):
    with OnnxRuntimeRunner(model) as runner:
        return {name: float(np.float32(np.abs(values).max() / 100)) for name, values in runner.run(batch).items()}


def simulate(model, batch, chosen, *, kept=True):
    """Return the outputs with the layers of these numbers in INT8, and those of a model that has their pairs alone."""
    scales = scales_of(model, batch)
    axes = Placement(Graph(model), scales, set()).axes
    with OnnxRuntimeRunner(model) as runner:
        types = runner.types
    rounded = Rounded(Graph(model), axes)
    with Simulation(model, rounded, types) as simulation:
        exact = simulation.exact(batch, keep=kept)
        is_int8 = np.array([number in chosen for number in rounded.numbers])
        found = simulation.run(exact, is_int8, rounded.vector(scales))
    graph = Graph(model)
    graph.insert_pairs({edge: axis for edge, axis in axes.items() if edge[0] in chosen}, scales)
    with OnnxRuntimeRunner(model, variant=graph.proto) as runner:
        return found, runner.run(batch), exact.outputs


def numbers(model):
    scales = dict.fromkeys(model.varying, 1.0)
    return sorted({number for number, _ in Placement(Graph(model), scales, set()).axes})


def check_close(found, expected):
    """Check two outputs whose last bits may differ: a layer in float in place of INT8 changes a thousand times more."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kept", [True, False])
def test_any_choice_of_layers_gives_the_outputs_of_a_model_with_their_pairs(varied, kept):
    batch = {"x": RANDOM.standard_normal((3, 4, 8, 8)).astype("f4")}
    layers = numbers(varied)
    assert len(layers) == 6  # four with weights, a product of activations, the residual Add
    for chosen in (set(layers), *({number} for number in layers), set(layers[1::2]), set()):
        found, expected, exact = simulate(varied, batch, chosen, kept=kept)
        changed = {"z"} if chosen == {layers[-2]} else {"y"} if chosen == {layers[-1]} else {"y", "z"}
        for name in ("y", "z"):
            check_close(found[name], expected[name])
            assert (found[name] != exact[name]).any() == (name in changed and bool(chosen))


def test_one_choice_after_another_and_another_scale(varied, monkeypatch):
    """Sessions are kept from choice to choice: none of them may be of another one."""
    from fastcal.tuning import simulation as module

    monkeypatch.setattr(module, "_SEGMENTS", 2)
    batch = {"x": RANDOM.standard_normal((3, 4, 8, 8)).astype("f4")}
    scales = scales_of(varied, batch)
    rounded = Rounded(Graph(varied), Placement(Graph(varied), scales, set()).axes)
    with OnnxRuntimeRunner(varied) as runner:
        types = runner.types
    coarse = {name: 4 * scale for name, scale in scales.items()}
    choices = [np.ones(6, bool), *np.eye(6, dtype=bool), np.ones(6, bool)]
    with Simulation(varied, rounded, types) as simulation:
        exact = simulation.exact(batch, keep=True)
        found = [
            simulation.run(exact, choice, rounded.vector(each))
            for choice in choices
            for each in (scales, coarse, scales)
        ]
    for index, (fine, other, again) in enumerate(zip(found[::3], found[1::3], found[2::3], strict=True)):
        np.testing.assert_array_equal(fine["y"], again["y"])
        np.testing.assert_array_equal(fine["z"], again["z"])
        assert any((fine[name] != other[name]).any() for name in fine)
        chosen = {number for number, is_int8 in zip(rounded.numbers, choices[index], strict=True) if is_int8}
        alone, _, _ = simulate(varied, batch, chosen)
        np.testing.assert_array_equal(fine["y"], alone["y"])


def test_what_onnxruntime_cannot_optimize_runs_as_it_is(varied, monkeypatch):
    """ONNX Runtime 1.32 cannot optimize some layers that read through a pair: see `Graph`."""
    session, levels = onnxruntime.InferenceSession, []

    def start(data, options, **settings):
        levels.append(options.graph_optimization_level)
        if levels[-1] == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL:
            raise RuntimeError("cannot optimize")
        return session(data, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    found, expected, _ = simulate(
        varied, {"x": RANDOM.standard_normal((1, 4, 8, 8)).astype("f4")}, set(numbers(varied))
    )
    check_close(found["y"], expected["y"])
    assert onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL in levels


def test_a_run_begins_at_the_segment_of_its_first_layer(varied, monkeypatch):
    """If it began later, the layer would run in float; if it began earlier, it would take longer than it must."""
    from fastcal.tuning import simulation

    run, begun = simulation._Part.run, []
    monkeypatch.setattr(simulation._Part, "run", lambda part, *given: begun.append(part) or run(part, *given))
    batch = {"x": RANDOM.standard_normal((1, 4, 8, 8)).astype("f4")}
    layers, counts = numbers(varied), []
    for number in layers:
        begun.clear()
        simulate(varied, batch, {number})
        counts.append(len(begun))
    assert counts[0] == 2 * len(layers)  # as many segments as layers, all of them twice
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(layers) + 1


def test_the_digits(tmp_path):
    model = Model(DIGITS / "digits.onnx")
    batch = {"image": RANDOM.standard_normal((2, 3, 32, 32)).astype("f4")}
    found, expected, _ = simulate(model, batch, set(numbers(model)))
    check_close(found["logits"], expected["logits"])


def test_a_model_with_layers_in_int8_is_valid_onnx(varied):
    rounded = Rounded(Graph(varied), Placement(Graph(varied), dict.fromkeys(varied.varying, 0.1), set()).axes)
    nodes, constants = rounded.replaced(rounded.proto.graph.node, rounded.outputs)
    proto = onnx.ModelProto()
    proto.CopyFrom(rounded.proto)
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(constants)
    onnx.checker.check_model(proto, full_check=True)
    pairs = [node.input[0] for node in nodes if node.op_type == "QuantizeLinear"]
    assert sorted(pairs) == sorted(set(pairs)) == sorted(rounded.tensors)  # layers that read one tensor share its pair
