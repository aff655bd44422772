"""The logits behind probabilities, and the noise that a Softmax hides."""

import numpy as np
import pytest

from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.logits import Logits
from fastcal.tuning.meter import NoiseMeter

RANDOM = np.random.default_rng(3)


def softmax(logits, axis):
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


@pytest.mark.parametrize(
    ("graph", "axis"),
    [
        ("f (float[2, 3, 5] x) => (float[2, 3, 5] y) { y = Softmax(x) }", 2),
        ("f (float[2, 3, 5] x) => (float[2, 3, 5] y) { y = Softmax<axis = 1>(x) }", 1),
        ("f (float[2, 3, 5] x) => (float[2, 3, 5] y) { y = Softmax<axis = -2>(x) }", 1),
        (
            "f (float[2, 5, 3] x) => (float[2, 3, 5] y) {"
            " p = Softmax<axis = 1>(x) y = Transpose<perm = [0, 2, 1]>(p) }",
            2,
        ),
        ("f (float[2, 3, 5] x) => (float[2, 3, 5] y) { p = Softmax<axis = 1>(x) y = Identity(p) }", 1),
    ],
)
def test_they_are_the_inputs_of_the_softmax_but_for_their_mean(onnx_file, graph, axis):
    logits = RANDOM.standard_normal((2, 3, 5)) * 4
    probabilities = softmax(logits, axis).astype("f4")
    found = Logits(Model(onnx_file(graph)), {}).of({"y": probabilities})
    np.testing.assert_allclose(found["y"], logits - logits.mean(axis, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("operator", ["Sigmoid", "Relu", "Identity"])
def test_other_outputs_stay_as_they_are(onnx_file, operator):
    model = Model(onnx_file(f"f (float[2, 3] x) => (float[2, 3] y) {{ y = {operator}(x) }}"))
    values = RANDOM.random((2, 3))
    assert Logits(model, {}).of({"y": values})["y"] is values


def test_a_class_of_probability_0_has_a_finite_logit(onnx_file):
    model = Model(onnx_file("f (float[1, 2] x) => (float[1, 2] y) { y = Softmax(x) }"))
    found = Logits(model, {}).of({"y": np.array([[1, 0]], "f4")})["y"]
    np.testing.assert_allclose(found, [[13.8155, -13.8155]], atol=1e-3)


def test_a_softmax_hides_no_noise(onnx_file):
    random = np.random.default_rng(0)
    weights = random.standard_normal((4, 3)).astype("f4")
    batch = {"x": random.standard_normal((16, 4)).astype("f4")}
    errors = {}
    for sureness in (0.3, 2):
        path = onnx_file(
            "f (float[N, 4] x) => (float[N, 3] y) { l = MatMul(x, w) y = Softmax(l) }", {"w": sureness * weights}
        )
        model = Model(path)
        with NoiseMeter(model, Placement(Graph(model), {"x": 0.03}, set()), [batch]) as meter:
            errors[sureness] = meter.errors(meter.choice(True), {"x": 0.03})
    assert errors[2].noise == pytest.approx(errors[0.3].noise, rel=1e-4)  # the weights have the same rounding
    assert errors[2].parts["y"] > 2 * errors[0.3].parts["y"]
