"""The noise of a network's outputs over some of a meter's batches."""

import numpy as np

from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.meter import NoiseMeter


def test_noise_over_the_first_batches_alone(onnx_file):
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((4, 3)).astype("f4")}
    model = Model(onnx_file("f (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", weights))
    # With a scale of 0.03, the second batch is clipped.
    batches = [{"x": (factor * random.standard_normal((16, 4))).astype("f4")} for factor in (1, 20)]
    axes = Placement(Graph(model), {"x": 0.03}, set()).axes
    found = []
    for given, counted in ((batches[:1], None), (batches, 1), (batches, None)):
        with NoiseMeter(model, axes, given) as meter:
            found.append(meter.noise(meter.choice(True), {"x": 0.03}, batches=counted))
    alone, first, both = found
    assert first == alone
    assert both > 100 * first
