"""The same calibration over Ray actors, to the same bytes: on two nodes of a real Ray cluster on this machine."""

import contextlib
import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastcal
from conftest import DIGITS, write_onnx
from fastcal.model import Model
from fastcal.observe.backends import OnnxRuntimeBackend
from fastcal.observe.with_ray import RayBackend
from fastcal.progress import Progress

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
with_ray = pytest.importorskip("fastcal.observe.with_ray")
Worker = pytest.importorskip("fastcal.observe.ray_worker").Worker

MODEL = DIGITS / "digits.onnx"

calibrate = functools.partial(fastcal.calibrate, backend="onnxruntime")


@pytest.fixture(scope="module")
def cluster():
    """A cluster that this process is connected to, of two nodes: two CPUs "east" and one "west"."""
    head = {
        "num_cpus": 2, "node_name": "east", "include_dashboard": False,
        "_system_config": {"prestart_worker_first_driver": False},
    }  # fmt: skip
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # for the cluster's processes
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, node_name="west")
    ray.init(address=cluster.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for the feeds below
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.sched_setaffinity(0, own)


def processes(title):
    """Processes whose command line begins with this, as Ray titles its workers by what they run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(title):
                found.append(int(folder.name))
        except OSError:  # it has ended
            pass
    return found


def wait_for(condition):
    """The first true result of `condition`, asked again and again."""
    end = time.monotonic() + 240
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


def digits(images=DIGITS / "images", **options):
    """Batches of 7 of the sample's 256 images: the last is completed with the first."""
    return fastcal.ImageFeed(images, preprocess="unit", model=MODEL, batch_size=7, **options)


@pytest.fixture(autouse=True)
def no_actor_left():
    """No test leaves an actor behind."""
    yield
    wait_for(lambda: not processes(b"ray::Worker"))


def on_workers(count):
    """Return a backend of that number of workers, which run ONNX Runtime."""
    return RayBackend(count, None, "onnxruntime", {"onnxruntime": OnnxRuntimeBackend()})


def many_tensors(onnx_file, count):
    """A network with inputs x0, x1 ... and outputs y0, y1 ..., twice as much each."""
    return onnx_file(
        "f (" + ", ".join(f"float[N, 3] x{i}" for i in range(count)) + ") => ("
        + ", ".join(f"float[N, 3] y{i}" for i in range(count)) + ") {"
        + " ".join(f"y{i} = Add(x{i}, x{i})" for i in range(count)) + "}"
    )  # fmt: skip


class Batches(fastcal.Feed):
    """A list of batches, as they are."""

    def __init__(self, batches):
        self.batch_size = 1
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def part(self, batches, **options):
        return type(self)(self.batches[batches.start : batches.stop])


class LateSecond(Batches):
    """Batches of which those after the first wait for later ones to be counted; `mark` is a file that says so."""

    start = 0

    def __init__(self, batches, mark):
        super().__init__(batches)
        self.mark = mark

    def part(self, batches, **options):
        part = LateSecond(self.batches[batches.start : batches.stop], self.mark)
        part.start = batches.start
        return part

    def __iter__(self):
        if self.start == 1:
            wait_for(self.mark.exists)
        yield from self.batches
        if self.start > 1:
            self.mark.touch()


def test_counts_are_those_of_one_process_where_their_order_shows(cluster, onnx_file, tmp_path):
    # Elements equal to the range before and after it doubles; ranges that are not known from the first batch on,
    # because all is 0 there, and set in the batches that are the last to be counted; tensors that are always 0; NaN and
    # infinity.
    random = np.random.default_rng(5)
    values = np.float32([0, 1, 1, 2, 4, 8, 0.3, 3, 6])
    path, tensors, batches = many_tensors(onnx_file, 12), np.arange(12), []
    for number in range(40):
        seen = (number >= tensors) & (tensors < 11)  # x1, x2 ... are 0 for ever more batches
        grown = np.float32(2 ** (number // 10))
        batches.append({f"x{i}": random.choice(values, (1, 3)) * grown * np.float32(seen[i]) for i in tensors})
    batches[20]["x5"][0, :2] = np.nan, -np.inf
    feed = LateSecond(batches, tmp_path / "mark")
    backend, model = OnnxRuntimeBackend(), Model(path)
    with backend.observer(model, None) as observer:
        for batch in feed:
            observer.observe(batch)
        expected = observer.histograms()
    seen = []
    found = on_workers(2).observe(model, feed, lambda p: seen.append((p.batches, p.images, p.total))).histograms
    assert seen[-1] == (40, 40, 40)
    assert seen == sorted(set(seen))
    assert list(found) == list(expected)
    for name, histogram in expected.items():
        assert found[name].counts.tolist() == histogram.counts.tolist(), name
        for attribute in ("range", "amax", "nan", "inf", "clamped"):
            assert getattr(found[name], attribute) == getattr(histogram, attribute), name
    assert sum(len(histogram.clamped) > 1 for histogram in expected.values()) > 5
    assert expected["x11"].range == 0


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A network, 120 batches that take it a while each, and the cache that one process makes of them."""
    random = np.random.default_rng(0)
    graph = "f (float[N, 1024] x) => (float[N, 1024] y) { a = MatMul(x, w) b = MatMul(a, w) y = MatMul(b, w) }"
    weights = random.standard_normal((1024, 1024), dtype="f4") / np.float32(32)
    path = write_onnx(tmp_path_factory.mktemp("slow") / "model.onnx", graph, {"w": weights})
    feed = fastcal.ArrayFeed([{"x": random.standard_normal((64, 1024), dtype="f4")} for _ in range(120)])
    return path, feed, calibrate(path, feed, threads=1).to_bytes()


@contextlib.contextmanager
def meanwhile(action):
    """Within it, the action is called with a process that is counting; yields a function to call with the progress."""
    state, used = Progress(), []

    def act():
        wait_for(lambda: state.batches > 8)
        (process, *_) = wait_for(lambda: processes(b"ray::Worker.count"))
        action(process)
        used.append(process)

    def progress(now):
        state.batches = now.batches

    thread = threading.Thread(target=act)
    thread.start()
    yield progress
    thread.join()
    assert len(used) == 1


def test_what_a_killed_worker_had_to_do_is_done_again_and_counted_once(cluster, slow, caplog):
    path, feed, expected = slow

    def kill(process):
        os.kill(process, signal.SIGKILL)

    with caplog.at_level(logging.WARNING, "fastcal"), meanwhile(kill) as progress:
        assert calibrate(path, feed, threads=1, workers=2, progress=progress).to_bytes() == expected
    assert len(re.findall(r"a worker died over batches \d+ to \d+, which are counted again", caplog.text)) == 1


def test_a_bad_image_is_the_same_error(cluster, tmp_path):
    images = [str(path) for path in sorted((DIGITS / "images").rglob("*.jpg"))[:50]]
    for number in (31, 44):
        images[number] = str(tmp_path / f"{number}.jpg")
        Path(images[number]).write_bytes(b"no JPEG")
    feed = digits(images)
    with pytest.raises(fastcal.FastcalError) as in_one_process:
        calibrate(MODEL, feed)
    with pytest.raises(fastcal.FastcalError) as with_workers:
        calibrate(MODEL, feed, workers=2)
    assert str(in_one_process.value).startswith(str(tmp_path / "31.jpg"))
    node, _, text = str(with_workers.value).partition(": ")
    assert node in ("on node east", "on node west")
    assert text == str(in_one_process.value)


@pytest.fixture
def start_worker(cluster):
    """A function that starts a worker in this process, which is on node "east", for a model with this digest."""
    logger = logging.getLogger("fastcal")
    handlers, level = logger.handlers[:], logger.level
    with contextlib.ExitStack() as stack:

        def start(path, digest):
            worker = Worker(os.getcwd(), str(path), digest, OnnxRuntimeBackend())
            stack.callback(lambda: worker._observer and worker._observing.__exit__(None, None, None))
            return worker

        yield start
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_what_is_missing_on_a_node_is_said_with_its_name(start_worker, tmp_path):
    for name in ("0.jpg", "1.jpg"):
        shutil.copy(DIGITS / "test" / "0" / "0012.jpg", tmp_path / name)
    path = tmp_path / "model.onnx"
    shutil.copy(MODEL, path)
    digest = Model(path).digest

    def count():
        with fastcal.ImageFeed(tmp_path, preprocess="unit", model=MODEL, batch_size=1) as feed:
            (tmp_path / "1.jpg").unlink(missing_ok=True)  # it has been seen where the calibration was started
            start_worker(path, digest).count(feed, {})

    with pytest.raises(fastcal.DataError, match=rf"^on node east: cannot read {tmp_path}/1.jpg: No such file"):
        count()
    path.write_bytes(path.read_bytes() + b"\x08\x08")
    with pytest.raises(fastcal.ModelError, match=rf"^on node east: {path} is another model"):
        count()
    path.unlink()
    with pytest.raises(fastcal.ModelError, match=rf"^on node east: cannot read model {path}: No such file"):
        count()


class Deadly(Batches):
    """Batches that end the process which reads them."""

    def __iter__(self):
        os._exit(1)


def test_workers_that_die_again_and_again_are_given_up(cluster, onnx_file, caplog, monkeypatch):
    monkeypatch.setattr(with_ray, "_ATTEMPTS", 2)
    feed = Deadly([{"x0": np.ones((1, 3), "f4")}])
    with pytest.raises(fastcal.FastcalError, match=r"2 workers died over batches 0 to 0: .*; Ray's logs tell more"):
        calibrate(many_tensors(onnx_file, 1), feed, workers=1)
    assert len(re.findall("a worker died over batches 0 to 0, which are counted again", caplog.text)) == 1


class Short(Batches):
    """Batches that end before the last."""

    def __iter__(self):
        return iter(self.batches[:3])


def test_a_feed_that_gives_too_few_batches(start_worker, onnx_file):
    path = many_tensors(onnx_file, 1)
    feed = Short([{"x0": np.ones((1, 3), "f4")}] * 8)
    with pytest.raises(fastcal.DataError, match="on node east: the feed gave 3 of 8 batches; leave workers out"):
        start_worker(path, Model(path).digest).count(feed, {})


class Strange(Batches):
    """Batches with values of the process that reads them, which says so once there are two; `folder` is for that."""

    def __init__(self, batches, folder):
        super().__init__(batches)
        self.folder = folder

    def part(self, batches, **options):
        return Strange(self.batches[batches.start : batches.stop], self.folder)

    def __iter__(self):
        (self.folder / str(os.getpid())).touch()
        wait_for(lambda: len(os.listdir(self.folder)) == 2)
        logging.getLogger("fastcal").info("strange batches")
        for batch in self.batches:
            time.sleep(0.02)  # until the other's first is there
            yield {name: array * os.getpid() for name, array in batch.items()}


def test_workers_that_compute_other_values_are_noticed(cluster, onnx_file, tmp_path, caplog):
    (tmp_path / "processes").mkdir()
    feed = Strange([{"x0": np.ones((1, 3), "f4")}] * 100, tmp_path / "processes")
    with caplog.at_level(logging.INFO, "fastcal"):
        calibrate(many_tensors(onnx_file, 1), feed, workers=2)
    assert caplog.text.count("workers find other values in the same batch") == 1
    assert caplog.text.count("strange batches") == 1


@pytest.mark.parametrize(
    ("feed", "options", "message"),
    [
        (iter([{"x0": np.ones((1, 3), "f4")}]), {}, "batches that are no list cannot be divided among workers"),
        (
            fastcal.ArrayFeed([{"x0": np.ones((1, 3), "f4")}], last_batch="drop"),
            {},
            "workers must know how many batches there are, and the feed does not; leave workers out",
        ),
        (None, {"workers": 0}, "workers is 0; it must be at least 1"),
        (None, {"until_stable": 1}, "until_stable looks at the batches one after another; leave it or workers out"),
        (None, {"backend": "tensorrt"}, "backend tensorrt needs GPUs, and the Ray cluster has none"),
        (None, {"workers": None, "ray_address": "auto"}, "ray_address is auto, and without workers"),
    ],
)
def test_what_cannot_be_spread(cluster, onnx_file, feed, options, message):
    if feed is None:
        feed = fastcal.ArrayFeed([{"x0": np.ones((1, 3), "f4")}])
    with pytest.raises(fastcal.FastcalError, match=message):
        calibrate(many_tensors(onnx_file, 1), feed, **{"workers": 2, **options})


def test_a_feed_that_cannot_be_divided(cluster, onnx_file):
    class Own(fastcal.Feed):
        def __len__(self):
            return 1

        def __iter__(self):
            return iter([{"x0": np.ones((1, 3), "f4")}])

    with pytest.raises(fastcal.FastcalError, match="a Own cannot be divided among workers; leave workers out"):
        calibrate(many_tensors(onnx_file, 1), Own(), workers=1)


def test_a_network_that_is_no_file(cluster):
    with pytest.raises(fastcal.FastcalError, match="workers run ONNX files, not an INetworkDefinition; leave workers"):
        calibrate(SimpleNamespace(num_inputs=0), fastcal.ArrayFeed([{"x": np.ones((1, 3), "f4")}]), workers=1)


@pytest.mark.parametrize("gpus", [0, 1])
def test_workers_share_the_cpus_of_nodes_that_have_room(gpus):
    nodes = [{"CPU": 64.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 2.0}, {"CPU": 8.0}, {}]
    for workers, cpus in ((1, 64), (2, 64), (3, 32), (4, 32), (5, 21 if not gpus else 1)):
        assert with_ray.cpus_each(nodes, workers, bool(gpus)) == cpus


def test_the_command_line_is_the_same_with_workers(cluster, run_fastcal, tmp_path):
    for name, options in (("one", ()), ("two", ("--workers", 2))):
        options = ("--batch-size", 7, "--limit", 100, "--shuffle", *options)
        done = run_fastcal("calibrate", MODEL, DIGITS / "images", "-o", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        assert "100 in 15 batches of 7" in done.stdout
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_a_node_that_dies(cluster, slow):
    path, feed, expected = slow
    (node,) = cluster.worker_nodes
    with meanwhile(lambda process: cluster.remove_node(node, allow_graceful=False)) as progress:
        assert calibrate(path, feed, threads=1, workers=3, progress=progress).to_bytes() == expected


@pytest.mark.parametrize("joins", [False, True])
def test_ctrl_c_leaves_no_actor_behind(cluster, tmp_path, joins):
    listed = [str(path) for path in sorted((DIGITS / "images").rglob("*.jpg"))]
    (tmp_path / "list.txt").write_text("\n".join(listed * 40))
    words = ["-o", "x.cache", "--workers", "1"]
    command = [sys.executable, "-m", "fastcal", "calibrate", MODEL, "list.txt", *words]
    process = subprocess.Popen(
        [*command, *(("--ray-address", cluster.address) if joins else ())], cwd=tmp_path, stderr=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(lambda: processes(b"ray::Worker.count"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=30)[1].splitlines()[-1] == "interrupted; nothing was written"
    assert process.returncode == 130
    assert os.listdir(tmp_path) == ["list.txt"]
    wait_for(lambda: not processes(b"ray::Worker"))
