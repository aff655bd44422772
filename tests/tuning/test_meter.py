"""The noise of a network's outputs over ever more of a meter's batches."""

import numpy as np

from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.meter import NoiseMeter


def test_noise_grows_batch_by_batch(onnx_file):
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((4, 3)).astype("f4")}
    model = Model(onnx_file("f (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", weights))
    # With a scale of 0.03, the second batch is clipped.
    batches = [{"x": (factor * random.standard_normal((size, 4))).astype("f4")} for factor, size in ((1, 16), (20, 8))]
    scales = {"x": 0.03}
    placement = Placement(Graph(model), scales, set())
    with NoiseMeter(model, placement, batches[:1]) as meter:
        alone = meter.errors(meter.choice(True), scales).noise
    with NoiseMeter(model, placement, batches) as meter:
        (first, noise), (both, more) = meter.growing(meter.choice(True), scales)
        assert (first, both) == (16, 24)
        assert noise == alone == meter.noise(meter.choice(True), scales)
        assert more == meter.errors(meter.choice(True), scales).noise > 100 * noise
