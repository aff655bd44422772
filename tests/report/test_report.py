"""Reports, in a real browser: what they say, that they sort and search, that they load nothing."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastcal
from conftest import DIGITS
from fastcal.errors import CacheError

MODEL = DIGITS / "digits.onnx"
PHONE, DESKTOP = (390, 844), (1280, 900)

#: Without these, Chromium asks for hosts that a closed network does not have.
OFFLINE = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    from selenium import webdriver

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile, *OFFLINE):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """A report in the browser."""

    def __init__(self, browser, path):
        self._browser = browser
        self.path = path
        browser.get(path.as_uri())

    def run(self, script, *arguments):
        return self._browser.execute_script(script, *arguments)

    def column(self, number):
        """The numbers, or texts, of a column's visible cells from top to bottom."""
        cells = self.run(
            "return [...document.querySelectorAll('tbody tr')].filter(row => row.offsetParent !== null).map("
            "row => row.cells[arguments[0]].dataset.value ?? row.querySelector('.name').textContent)",
            number,
        )
        return cells if number == 1 else [float(cell) for cell in cells]

    def click(self, title):
        """Click the head of a column."""
        for button in self._browser.find_elements("css selector", "th button"):
            if button.text == title:
                return button.click()
        raise AssertionError(title)

    def search(self, text):
        """Type into the search field; returns what the page says of it."""
        field = self._browser.find_element("css selector", "input")
        field.clear()
        field.send_keys(text or " ")
        return self._browser.find_element("css selector", "[role=status]").text

    def looks(self):
        """The tensors worth a look, each with what is said of it."""
        items = self._browser.find_elements("css selector", "#looks li")
        return [
            (
                item.find_element("css selector", "a").text,
                [mark.text for mark in item.find_elements("class name", "mark")],
            )
            for item in items
        ]

    def look_at(self, size, scheme):
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self._browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._browser.get(self.path.as_uri())

    def said_in_the_console(self):
        return self._browser.get_log("browser")


@pytest.fixture(scope="module")
def sample(browser, tmp_path_factory):
    """The report of the digits sample, and the cache it is of."""
    with fastcal.ImageFeed(DIGITS / "images", model=MODEL, batch_size=8, device="cpu") as feed:
        cache = fastcal.calibrate(MODEL, feed, backend="onnxruntime", algorithm="percentile", quantile=0.99)
    path = tmp_path_factory.mktemp("report") / "report.html"
    fastcal.write_report(cache, path, about={"images": "<b>a & b</b>"})
    return SimpleNamespace(page=Page(browser, path), cache=cache)


def large_network(path):
    """A network of 200 tensors, most of them ordinary; its names are as bad as names can be."""
    random = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for number in range(194):
        y = f"/layer{number // 10}/{'relu' if number % 2 else 'conv'}_{number}/an_output_with_quite_a_long_name"
        if number % 2:
            nodes.append(helper.make_node("Relu", [x], [y]))
        else:
            kernel = np.eye(4, dtype=np.float32) + random.normal(0, 0.1, (4, 4)).astype(np.float32)
            weights.append(numpy_helper.from_array(kernel.reshape(4, 4, 1, 1), f"w{number}"))
            nodes.append(helper.make_node("Conv", [x, f"w{number}"], [y]))
        x = y
    weights.append(numpy_helper.from_array(np.float32(1000), "thousand"))
    for kind, inputs, y in (
        ("Sub", ["x", "x"], "dead"), ("Sqrt", ["x"], "root"), ("Mul", ["x", "thousand"], "wide"),
        ("Neg", ["x"], '<img src=x onerror="alert(1)">'), ("Identity", ["x"], "y"),
    ):  # fmt: skip
        nodes.append(helper.make_node(kind, inputs, [y]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 16, 16]) for name in "xy"]
    graph = helper.make_graph(nodes, "large", value[:1], value[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def large(browser, tmp_path_factory):
    """The report of a network of 200 tensors, some of them worth a look."""
    folder = tmp_path_factory.mktemp("large")
    large_network(folder / "large.onnx")
    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((8, 4, 16, 16), dtype=np.float32)} for _ in range(4)]
    options = {"backend": "onnxruntime", "algorithm": "percentile", "exact": True}
    cache = fastcal.calibrate(folder / "large.onnx", batches, **options)
    fastcal.write_report(cache, folder / "report.html")
    return SimpleNamespace(page=Page(browser, folder / "report.html"), cache=cache, batches=batches)


def test_the_table_has_every_tensor(sample):
    page, cache = sample.page, sample.cache
    page.look_at(DESKTOP, "light")
    assert page.column(1) == list(cache.scales)
    assert page.column(2) == list(cache.scales.values())
    assert page.column(3) == [cache.observed.histograms[name].amax for name in cache.scales]
    with fastcal.ImageFeed(DIGITS / "images", model=MODEL, batch_size=256, device="cpu") as feed:
        (batch,) = feed
        share = np.mean(np.abs(batch["image"]) > 127 * cache.scales["image"])
    assert 0.005 < share < 0.01  # the quantile is 0.99
    assert page.column(4)[0] == pytest.approx(share, abs=5e-4)
    assert page.run("return document.querySelectorAll('tbody svg path').length") > 2 * len(cache.scales)
    assert "takes the scale of /1/Relu_output_0" in page.run("return document.querySelector('#tensor4').textContent")


def test_a_histogram_shows_what_is_clipped(sample):
    page, cache = sample.page, sample.cache
    page.look_at(DESKTOP, "light")
    drawn = page.run(
        "return [...document.querySelectorAll('tbody tr')].map(row => [...row.querySelectorAll('path')].map("
        "path => [path.getAttribute('style'), path.getAttribute('d'), path.ownerSVGElement.viewBox.baseVal.width]))"
    )
    for (name, scale), paths in zip(cache.scales.items(), drawn, strict=True):
        amax, threshold = cache.observed.histograms[name].amax, 127 * scale
        ((line, width),) = [(d, width) for style, d, width in paths if "stroke: var(--threshold)" in style]
        assert float(line.split()[1]) / width == pytest.approx(threshold / max(amax, threshold), abs=1e-3)
        left_ends = [float(d.split()[1]) / width for style, d, _ in paths if "fill: var(--clipped)" in style]
        assert len(left_ends) == (amax > threshold)
        assert all(end == pytest.approx(threshold / amax, abs=1e-3) for end in left_ends)


def test_it_says_what_was_calibrated_from_what(sample):
    page = sample.page
    page.look_at(DESKTOP, "light")
    about = page.run(
        "return Object.fromEntries([...document.querySelectorAll('dt')].map(dt => "
        "[dt.textContent, dt.nextElementSibling.textContent]))"
    )
    assert about["network"] == str(MODEL)
    assert about["samples"] == "256 in 32 batches"
    assert about["prepared"].startswith("crop 0.875 to 32x32, RGB")
    assert about["scales by"] == "percentile, quantile 0.99"
    assert about["run by"] == "onnxruntime, FP32"
    assert about["model's SHA-256"] == sample.cache.record.entries["model"]
    assert f"onnx {onnx.__version__}" in about["versions"]
    assert about["images"] == "<b>a & b</b>"
    last = sample.cache.observed.progress[-1]
    facts = page.run("return [...document.querySelectorAll('.facts b')].map(b => b.textContent)")
    assert facts == [
        "20", "256", f"{256 / last.seconds:,.0f}", f"{last.seconds:.1f} s", f"{100 * last.waited / last.seconds:.0f} %",
    ]  # fmt: skip
    charts = page.run("return [...document.querySelectorAll('.charts svg')].map(svg => svg.textContent)")
    assert ["samples a second" in charts[0], "waiting for data" in charts[1]] == [True, True]


def test_columns_sort(large):
    page = large.page
    page.look_at(DESKTOP, "light")
    rows = dict(zip(page.column(1), zip(*map(page.column, (0, 2, 3, 4)), strict=True), strict=True))
    for column, title in ((2, "Scale"), (3, "Largest |x|"), (4, "Clipped")):
        before = page.column(column)
        for backwards in (True, False, True):
            page.click(title)
            now = page.column(column)
            assert now == sorted(before, reverse=backwards)
            assert now != before
    assert dict(zip(page.column(1), zip(*map(page.column, (0, 2, 3, 4)), strict=True), strict=True)) == rows
    page.click("Tensor")
    names = page.column(1)
    assert names != list(rows)
    layer = [name for name in names if name.startswith("/layer")]
    assert [name.split("/")[1] for name in layer] == [f"layer{number // 10}" for number in range(194)]
    page.click("#")
    assert page.column(1) == list(rows)
    page.click("#")
    assert page.column(1) == list(rows)[::-1]


def test_search_finds_names_and_remarks(large):
    page = large.page
    page.look_at(DESKTOP, "light")
    names = page.column(1)
    assert page.search("RELU_1") == f"{sum('relu_1' in name for name in names)} of 200"
    assert page.column(1) == [name for name in names if "relu_1" in name]
    assert page.search("layer3 conv") == "5 of 200"
    page.click("Scale")  # what is found stays found
    assert len(page.column(1)) == 5
    assert page.search("always 0") == "1 of 200"
    assert page.column(1) == ["dead"]
    assert page.search("nothing has this name") == "0 of 200"
    assert page.search("") == "200 of 200"


def test_what_is_worth_a_look_comes_first(large):
    page = large.page
    page.look_at(DESKTOP, "light")
    looks = page.looks()
    nan = sum(int((batch["x"] < 0).sum()) for batch in large.batches)
    assert looks[0][0] == "root"
    assert looks[0][1][0] == f"{nan:,} NaN left out"
    assert looks[1] == ("dead", ["always 0"])
    far = {name: mark for name, marks in looks for mark in marks if "its neighbours'" in mark}
    assert far == {"wide": "scale 1,000 times its neighbours'"}
    page.search("layer3")
    page.run("document.querySelector('#looks a').click()")
    assert page.run("return document.querySelector(':target .name').textContent") == "root"
    assert len(page.column(1)) == 200


def test_the_most_clipped_come_first(sample):
    sample.page.look_at(DESKTOP, "light")
    shares = [float(marks[0].removesuffix(" % clipped")) for _, marks in sample.page.looks()]
    assert len(shares) == 8
    assert shares == sorted(shares, reverse=True)
    clipped = sorted((round(100 * share, 2) for share in sample.page.column(4)), reverse=True)
    assert shares == clipped[:8]


@pytest.mark.parametrize("report", ["sample", "large"])
def test_nothing_is_loaded_and_nothing_goes_wrong(report, request):
    page = request.getfixturevalue(report).page
    page.look_at(DESKTOP, "light")
    for title in ("Tensor", "Clipped", "#"):
        page.click(title)
    page.search("conv")
    assert page.said_in_the_console() == []
    assert page.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert page.run("return document.images.length") == 0  # a tensor's name is no HTML
    assert page.path.stat().st_size < 2_000_000
    ids = page.run("return [...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("report", ["sample", "large"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_it_fits_the_screen(report, size, request):
    page = request.getfixturevalue(report).page
    page.look_at(size, "light")
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    page.click("Scale")
    scales = page.column(2)
    assert scales == sorted(scales, reverse=True)
    assert len(scales) in (20, 200)


def test_dark_and_light(sample):
    lightness = {}
    for scheme in ("light", "dark"):
        sample.page.look_at(DESKTOP, scheme)
        colours = sample.page.run(
            "const paths = [...document.querySelectorAll('tbody path')];"
            "const path = paths.find(path => path.style.fill.includes('--counts'));"
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(path).fill]"
        )
        lightness[scheme] = [sum(map(int, colour[4:-1].split(","))) / 765 for colour in colours]
    assert lightness["light"][0] > 0.9 > 0.3 > lightness["light"][1]
    assert lightness["dark"][0] < 0.15 < 0.8 < lightness["dark"][1]
    assert lightness["light"][2] != lightness["dark"][2]


def test_what_no_report_can_be_made_of(tmp_path):
    cache = fastcal.CalibrationCache({"x": 1.0})
    with pytest.raises(CacheError, match="has no histograms: make the report from what fastcal"):
        fastcal.write_report(cache, tmp_path / "report.html")
    cache = fastcal.calibrate(MODEL, [{"image": np.ones((1, 3, 32, 32), np.float32)}], backend="onnxruntime")
    with pytest.raises(fastcal.FastcalError, match=r"cannot write .*nowhere/report.html: there is no folder"):
        fastcal.write_report(cache, tmp_path / "nowhere" / "report.html")
    fastcal.write_report(cache, tmp_path / "report.html")  # of a single batch
    assert "1 in 1 batch<" in (tmp_path / "report.html").read_text()


def test_a_tuning_shows_its_layers_and_its_curve(tmp_path):
    layers = [fastcal.RankedLayer(f"layer <{number}>", f"y{number}", number / 10, 100.0) for number in range(1, 5)]
    cache = fastcal.calibrate(MODEL, fastcal.ImageFeed(DIGITS / "images", model=MODEL, limit=16))
    points = [fastcal.TuningPoint(0, 1.0, 12.0, 0.5), fastcal.TuningPoint(1, 0.75, 30.0, 1.0)]
    tuning = fastcal.Tuning(cache, ["y4"], ranking=layers, curve=points, result=points[1], metric="top-1", samples=7)
    fastcal.write_report(tuning, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    accuracy = page[page.index('id="accuracy"') : page.index("Made from")]
    assert "30.0 dB at the outputs, top-1 1, on 7 held-out samples" in accuracy
    shown = re.findall(r"layer &lt;(\d)&gt; .*?>(\d+\.\d) % of the noise", accuracy)
    assert shown == [("4", "40.0"), ("3", "30.0"), ("2", "20.0"), ("1", "10.0")]
    assert accuracy.count("stays in float") == 1
    assert accuracy.index("stays in float") < accuracy.index("layer &lt;3&gt;")
    assert [title in accuracy for title in ("dB at the outputs</text>", "top-1</text>")] == [True, True]
    fastcal.write_report(cache, tmp_path / "plain.html")
    assert 'id="accuracy"' not in (tmp_path / "plain.html").read_text()
