"""report.html: it is made from the folder alone, for any run, and it is safe, self-contained and readable."""

from __future__ import annotations

import base64
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import write_run

from jepa.reports.charts import (
    MAX_HOVER_COLUMNS,
    MAX_POINTS,
    Chart,
    Line,
    ReferenceLine,
    downsample,
    line_chart,
    nice_ticks,
    number,
    scatter,
    tick_labels,
)
from jepa.reports.page import principal_plane
from jepa.reports.run import write_report
from jepa.runs.metrics import FolderLogger

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags with attributes and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart", steps=600, eval_every=200)


def report(folder: Path) -> Page:
    return Page(write_report(folder))


def test_the_report_shows_status_verdict_table_curves_pictures_command_and_configuration(run):
    page = report(run)
    for words in ("quickstart", "finished", "learning", "untrained encoder", "raw pixels", "trained encoder, step 600"):
        assert words in page.text
    for words in (
        "Loss",
        "no measure of progress",
        "Learning rate",
        "Effective rank",
        "Linear probe",
        "Waiting for data",
        "Masks",
        "patch_size",
    ):
        assert words in page.text
    assert "torch " in page.text
    assert page.count("figure") > 12


def test_every_metric_of_the_run_has_a_curve(tmp_path):
    logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
    for step in (1, 2):
        logger.log(step, {"train/loss": 1.0, "train/own_term": 0.125, "other/thing": 7.0})
    page = report(tmp_path)
    assert "train/own_term 0.125" in page.text
    assert "other/thing 7" in page.text


def test_the_report_needs_nothing_outside_itself(run):
    page = report(run)
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")


def test_every_chart_is_well_formed_and_stays_within_its_frame(run):
    charts = re.findall(r'<svg viewBox="0 0 360 \d+".*?</svg>', report(run).html, flags=re.DOTALL)
    assert len(charts) > 12
    for chart in charts:
        root = ElementTree.fromstring(chart)
        width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
        for element in root.iter("path"):
            if "L" in element.attrib["d"]:
                numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", element.attrib["d"])]
                assert all(0 <= x <= width for x in numbers[0::2])
                assert all(0 <= y <= height for y in numbers[1::2])


def test_pictures_of_the_latest_evaluation_stand_beside_those_of_step_0_where_they_differ(run):
    page = report(run)
    shown = [base64.b64decode(a["src"].partition(",")[2]) for tag, a in page.tags if tag == "img"]
    first, last = run / "media" / "step_00000000", run / "media" / "step_00000600"
    assert shown.count((first / "features.png").read_bytes()) == 1
    assert shown.count((last / "features.png").read_bytes()) == 1
    assert shown.count((last / "masks.png").read_bytes()) == 1
    assert "Masks as in training" in page.text


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "\"><img src=x onerror='a'>", "a & b </title>", "名前"])
def test_no_text_of_the_run_becomes_markup(tmp_path, evil):
    write_run(tmp_path, steps=1, log_every=1, eval_every=0, name=evil, status="failed", message=f"OSError: {evil}")
    (tmp_path / "config.yaml").write_text(f"name: {evil}", encoding="utf-8")
    page = report(tmp_path)
    assert page.count("script") == page.count("img") == 0
    assert f"OSError: {evil}" in page.text
    assert f"name: {evil}" in page.text


def test_a_metric_or_a_label_that_looks_like_markup_is_text(tmp_path):
    FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None).log(1, {"x/<script>": 1.0})
    assert report(tmp_path).count("script") == 0
    assert "<script>" not in scatter([(0, 0), (1, 1)], ["<script>", "b"])


@pytest.mark.parametrize("status", ["finished", "stopped", "failed", "running"])
def test_the_status_and_its_reason_are_shown(tmp_path, status):
    write_run(tmp_path, steps=20, eval_every=0, status=status, message="signal 15" if status == "stopped" else "")
    page = report(tmp_path)
    assert f"quickstart {status}" in page.text
    assert ("stopped: signal 15" in page.text) == (status == "stopped")


def test_a_run_that_was_closed_before_its_end_was_recorded_is_not_called_running(tmp_path):
    write_run(tmp_path, steps=2, eval_every=0, status="failed")
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "message": ""}))
    assert "quickstart failed" in report(tmp_path).text


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0, "eval_every": 0},
        {"steps": 1, "log_every": 1, "eval_every": 0},
        {"steps": 1, "log_every": 1, "eval_every": 1},
        {"steps": 0, "eval_every": 1},
        {"steps": 40, "eval_every": 20, "classes": 0},
        {"steps": 40, "eval_every": 20, "pictures": False},
        {"steps": 40, "eval_every": 20, "classes": 40},
        {"steps": 40, "eval_every": 20, "kind": "collapsing"},
    ],
    ids=str,
)
def test_any_run_has_a_report(tmp_path, options):
    assert "quickstart" in report(write_run(tmp_path, **options)).text


def test_an_empty_folder_has_a_report(tmp_path):
    assert "too early to tell" in report(tmp_path).text


def test_a_loss_that_is_not_finite_is_said_and_leaves_a_gap(tmp_path):
    logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
    for step in range(1, 10):
        logger.log(step, {"train/loss": math.nan if step in (4, 5) else 1.0 / step, "train/grad_norm": math.inf})
    page = report(tmp_path)
    assert "0.111 (2 not finite)" in page.text
    assert "no finite value yet" in page.text
    assert page.html.count('<path class="line c0" d="M54') == 1
    assert "nan" not in re.sub(r"<title>.*?</title>", "", page.html, flags=re.DOTALL)


def test_a_long_run_has_a_small_report_quickly(tmp_path):
    write_run(tmp_path, steps=5000, log_every=1, eval_every=500, pictures=False)
    started = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - started < 1.0
    assert path.stat().st_size < 400_000


def test_readers_never_see_half_a_report(tmp_path, monkeypatch):
    write_run(tmp_path, steps=20, eval_every=0)
    before = write_report(tmp_path).read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_command_and_the_interruptions_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/bin/jepa-train", "experiment=quickstart", "name=my run"])
    FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
    FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=1200)
    text = report(tmp_path).text
    assert "jepa-train experiment=quickstart 'name=my run'" in text
    assert "Continued from step 1,200." in text


finite = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(finite, min_size=2, max_size=2, unique=True), st.integers(2, 8))
def test_ticks_are_round_increasing_and_enclose_the_range(bounds, count):
    low, high = sorted(bounds)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step, rtol=1e-6)
    assert any(math.isclose(step / 10 ** math.floor(math.log10(step) + 1e-6), m, rel_tol=1e-5) for m in (1, 2, 5))
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert len(ticks) <= count + 3


@given(st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=900))
def test_thinning_keeps_the_extremes_the_end_and_the_limit(values):
    points = list(enumerate(values))
    buckets = downsample(points)
    kept = [value for value in values if math.isfinite(value)]
    assert len(buckets) <= MAX_POINTS
    assert buckets[-1].step == len(values) - 1
    if kept:
        assert min(b.low for b in buckets if math.isfinite(b.low)) == min(kept)
        assert max(b.high for b in buckets if math.isfinite(b.high)) == max(kept)


@given(
    st.lists(st.one_of(finite, st.just(math.nan), st.just(math.inf)), min_size=1, max_size=300),
    st.one_of(finite, st.just(math.nan)),
    st.booleans(),
)
def test_any_values_can_be_drawn(values, level, log_if_wide):
    lines = [Line(name="a", points=list(enumerate(values)))]
    figure = line_chart(Chart(title="t", log_if_wide=log_if_wide), lines, [ReferenceLine(name="l", value=level)])
    root = ElementTree.fromstring(figure)
    assert root.tag == "figure"
    assert figure.count('class="strip"') <= MAX_HOVER_COLUMNS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.41234, "0.412"), (69.14, "69.1"), (1234.5, "1234"), (12_500, "12.5k"), (3_000_000, "3M"),
     (1e-4, "1e-4"), (-3.25e-5, "-3.25e-5"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_plane_of_the_embeddings_holds_their_main_variance():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 3)) * [9, 5, 0.1] @ np.linalg.qr(rng.normal(size=(8, 3)))[0].T + 4
    points, shares = principal_plane(vectors)
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert np.allclose(points.std(axis=0), [9, 5], rtol=0.2)
    between = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
    assert np.allclose(np.linalg.norm(points[:, None] - points, axis=-1), between, atol=1)


def test_a_run_on_clips_shows_motion_probes_the_middle_frame_and_the_error_over_the_horizon(tmp_path):
    page = report(write_run(tmp_path, steps=40, eval_every=20, clips=True))
    for words in ("Is motion learned?", "Position probe, R²", "middle frame only", "copy of the last step"):
        assert words in page.text
    assert "Prediction error over the horizon over 4 horizons" in page.html
    assert "_h1" not in page.text
    assert "velocity_r2" not in page.text


def test_data_device_and_duration_stand_on_top(tmp_path):
    logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None, device="NVIDIA H200")
    (tmp_path / "config.yaml").write_text("dataset: {_target_: jepa.data.images.ImageFolder, root_path: /data/birds}")
    for step in (1, 2):
        logger.log(step, {"samples": 500 * step, "perf/samples_per_s": 10.0})
    assert (
        "data ImageFolder of /data/birds device NVIDIA H200 training time 1 min 40 s steps 2" in report(tmp_path).text
    )


def test_constant_curves_and_criteria_that_labels_make_needless_are_folded_away(tmp_path):
    logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
    for step in (1, 2):
        row = {"train/loss": 1.0 / step, "train/weight_decay": 0.05, "select/lidar": 3.0 * step}
        logger.log(step, row | {"probe/knn_top1": 40.0})
    html = report(tmp_path).html
    folded = html.index("<details")
    assert max(html.index("kNN probe, top-1"), html.index(">Loss")) < folded
    assert folded < html.index("Selection without labels") < html.index("LiDAR") < html.index(">Weight decay")
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("probe/knn_top1", "collapse/rank"))  # a run without labels
    html = report(tmp_path).html
    assert html.index("LiDAR") < html.index("<details")


def test_a_picture_has_the_caption_of_its_step(tmp_path):
    write_run(tmp_path, steps=4, eval_every=4)
    for step in (0, 4):
        folder = tmp_path / "media" / f"step_{step:08d}"
        captions = json.loads((folder / "captions.json").read_text())
        (folder / "captions.json").write_text(json.dumps(captions | {"features": f"{step + 11} % of the variance"}))
    text = report(tmp_path).text
    assert text.index("step 0 (untrained) 11 % of the variance") < text.index("step 4 15 % of the variance")


def pixels_of(figure) -> list[float]:
    [path] = re.findall(r'<path class="line c0" d="(M.*?L.*?)"', figure)
    return [float(y) for y in re.findall(r" (-?[\d.]+)", path)]


@pytest.mark.parametrize("level", [5000.0, -5000.0, 40.0])
def test_no_baseline_flattens_a_curve_and_each_has_its_value_in_the_legend(level):
    lines = [Line(name="a", points=[(0, 20.0), (1, 30.0), (2, 45.0)])]
    figure = line_chart(Chart(title="t"), lines, [ReferenceLine(name="raw pixels", value=level)])
    heights = pixels_of(figure)
    assert max(heights) - min(heights) > 50
    assert f"raw pixels <b>{number(level)}" in figure
    assert ("not in this range" in figure) == (level != 40) == ('class="level' not in figure)


def test_chance_does_not_look_like_a_change_on_an_axis_in_percent():
    lines = [Line(name="a", points=[(0, 20.5), (1, 20.1), (2, 20.3)])]
    heights = pixels_of(line_chart(Chart(title="t", unit="%"), lines))
    assert max(heights) - min(heights) < 10


def test_labels_of_ticks_differ():
    assert tick_labels([1.181, 1.182, 1.183]) == ["1.181", "1.182", "1.183"]
    assert tick_labels([0.0, 10_000, 20_000]) == ["0", "10k", "20k"]


def test_a_run_on_images_has_no_section_on_motion(run):
    assert "motion" not in report(run).text
