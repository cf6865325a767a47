"""The finders: their rules on curves with known answers, and their commands on a tiny configuration."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hostile_text import HOSTILE, count_as_text
from voc_folder import write_voc, xml

from jepa.cli.find import main
from jepa.reports.page import Table
from jepa.training import find_batch
from jepa.training.find_batch import MeasuredSize, divisors, fastest
from jepa.training.find_lr import Point, choose, draw_charts, rerun_command, smooth, write_result
from jepa.types import LossOutput

LRS = [10 ** (-6 + 6 * k / 149) for k in range(150)]


@pytest.fixture
def small(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_batch, "SECONDS", 0.0)
    return [*tiny, "batch_size=12", "dataset.num_samples=96", "logger=none", "name=small"]


def curve(loss, spread=lambda lr: 1.0):
    return [Point(lr, loss(lr), spread(lr)) for lr in LRS]


def falling(lr):
    """From 1 to 0, nine tenths of it at 9e-3."""
    return 1 / (1 + lr / 1e-3)


# the rule for the learning rate


def test_the_spread_decides_where_the_features_collapse():
    choice = choose(curve(falling, spread=lambda lr: 1 / (1 + lr / 1e-4)))
    assert 1e-4 <= choice.lr <= 2e-4
    assert "spread" in choice.reason
    assert choice.limits["settled"] > choice.lr


def test_the_loss_decides_where_the_features_do_not_collapse():
    choice = choose(curve(falling))
    assert 9e-3 <= choice.lr <= 2e-2
    assert "collapse" not in choice.limits
    turned = choose(curve(lambda lr: falling(lr) + 10 * lr))
    assert turned.limits["turn"] > turned.limits["settled"] >= turned.lr


def test_a_scale_or_shift_of_the_curves_changes_nothing():
    points = curve(falling, spread=lambda lr: 1 / (1 + lr / 1e-4))
    other = [Point(lr, 7 * loss + 3, 5 * spread) for lr, loss, spread in points]
    assert choose(points).lr == choose(other).lr


def test_nothing_is_chosen_without_a_falling_loss_or_with_few_points():
    assert choose(curve(lambda lr: 1 + lr)) is None
    assert choose(curve(falling)[:9]) is None


def test_smoothing_keeps_a_constant():
    assert smooth([2.5] * 20) == pytest.approx([2.5] * 20)


# the rule for the batch


def test_the_smallest_of_the_fastest_sizes_is_taken():
    rates = [(1, 50.0), (2, 99.0), (4, 100.0), (8, None)]
    best = fastest([MeasuredSize(size, rate, 1) for size, rate in rates])
    assert best is not None
    assert best.size == 2
    assert fastest([MeasuredSize(1, None, 1)]) is None
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# the commands


@pytest.mark.slow
def test_lr_is_found_with_its_table_and_chart_beside_the_run(small, capsys):
    assert main(["lr", *small, "--steps", "40", "--low", "1e-4"]) in (0, 1)
    output = capsys.readouterr().out
    assert "spread" in output
    result = json.loads(Path("outputs/small-find-lr/find.json").read_text())
    assert len(result["points"]) <= 40
    assert result["points"][0]["lr"] == pytest.approx(1e-4)
    if result["found"]:
        assert f"lr={result['found']['lr']:g}" in output.split("jepa-train")[1]
    assert "<svg" in Path("outputs/small-find-lr/find.html").read_text()
    assert os.listdir("outputs") == ["small-find-lr"]


@pytest.mark.slow
def test_the_range_test_ends_where_the_loss_is_not_finite(small, monkeypatch):
    from jepa.objectives.jepa import JEPA

    forward = JEPA.forward
    calls = []

    def blown(self, batch, masks):
        calls.append(0)
        output = forward(self, batch, masks)
        return output._replace(loss=output.loss * (math.nan if len(calls) > 5 else 1))

    monkeypatch.setattr(JEPA, "forward", blown)
    assert main(["lr", *small, "--steps", "30"]) == 1
    assert len(json.loads(Path("outputs/small-find-lr/find.json").read_text())["points"]) == 5


@pytest.mark.slow
def test_the_fastest_micro_batch_keeps_the_batch(small, capsys):
    assert main(["batch", *small]) == 0
    output = capsys.readouterr().out
    result = json.loads(Path("outputs/small-find-batch/find.json").read_text())
    assert [trial["size"] for trial in result["trials"]] == divisors(12)
    command = output.split("jepa-train")[1].split()
    assert f"micro_batch_size={result['found']}" in command
    assert "batch_size=12" in command
    assert "table: outputs/small-find-batch/find.html" in output


def out_of_memory_above(limit, monkeypatch):
    from jepa.objectives.jepa import JEPA

    forward = JEPA.forward

    def limited(self, batch, masks) -> LossOutput:
        if len(batch.clips) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, masks)

    monkeypatch.setattr(JEPA, "forward", limited)


def test_a_size_that_does_not_fit_is_reported_and_no_larger_one_is_tried(small, monkeypatch, capsys):
    out_of_memory_above(3, monkeypatch)
    assert main(["batch", *small]) == 0
    result = json.loads(Path("outputs/small-find-batch/find.json").read_text())
    assert [trial["size"] for trial in result["trials"]] == [1, 2, 3, 4]
    assert result["found"] <= 3
    assert "out of memory" in capsys.readouterr().out


def test_the_status_is_one_if_no_sample_fits(small, monkeypatch, capsys):
    out_of_memory_above(0, monkeypatch)
    assert main(["batch", *small]) == 1
    assert "not even one sample fits" in capsys.readouterr().err


@pytest.mark.slow
def test_the_largest_batch_comes_with_its_learning_rate(small, monkeypatch, capsys):
    out_of_memory_above(48, monkeypatch)
    assert main(["batch", *small, "lr=1e-3", "--largest"]) == 0
    output = capsys.readouterr().out
    assert "batch_size=48 is the largest tried that fits" in output
    assert "lr=0.002" in output


def test_on_a_cpu_the_search_ends_before_the_memory_does(small, monkeypatch):
    monkeypatch.setattr(find_batch, "free_memory", lambda: -1)
    assert main(["batch", *small]) == 0
    trials = json.loads(Path("outputs/small-find-batch/find.json").read_text())["trials"]
    assert [trial["samples_per_s"] is None for trial in trials] == [False, True]
    assert "not tried" in trials[1]["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr", "epohcs=3", "image_size=225"], "jepa-find: 2 errors in the configuration"),
        (["lr", "--low", "1"], "needs 10 steps or more and 0 < low < high"),
        (
            ["batch", "batch_size=200", "dataset.num_samples=96", "logger=none"],
            "smaller than one batch",
        ),
    ],
)
def test_a_wrong_command_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == []


@pytest.mark.slow
def test_refusals_come_without_torch(tmp_path):
    program = "import sys; from jepa.cli.find import main; assert main(['lr', 'nonsense=1']) == 2"
    check = "assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", f"{program}; {check}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_the_result_so_far(small, monkeypatch, capsys):
    from jepa.objectives.jepa import JEPA

    after = JEPA.after_step

    def interrupted(self, step):
        if step == 25:
            signal.raise_signal(signal.SIGINT)
        return after(self, step)

    monkeypatch.setattr(JEPA, "after_step", interrupted)
    assert main(["lr", *small, "--steps", "1000"]) in (1, 130)
    assert "interrupted" in capsys.readouterr().out
    assert len(json.loads(Path("outputs/small-find-lr/find.json").read_text())["points"]) == 25


def test_no_name_or_error_becomes_markup_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Table(heads=["size", ""], rows=[["1", HOSTILE]])
    folder = write_result(SimpleNamespace(name=HOSTILE), "batch", {}, table=table, lines=[HOSTILE, HOSTILE])
    assert count_as_text((folder / "find.html").read_text()) == 5


def test_the_page_marks_what_was_chosen_and_has_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = rerun_command(["experiment=quickstart", "lr=1"], lr="0.01")
    lines, config = ["lr=0.01: it is safe", command], SimpleNamespace(name="x")
    folder = write_result(config, "lr", {"found": 1}, charts=draw_charts(curve(falling), 0.01), lines=lines)
    page = (folder / "find.html").read_text()
    assert page.index("<strong>lr=0.01</strong>") < page.index("<pre>jepa-train experiment=quickstart lr=0.01</pre>")
    assert page.count('<path class="mark-line"') == 2
    x = 54 + (360 - 16 - 54) * 4 / 6  # from 1e-6 to 1
    assert page.count(f'd="M{x:.1f} ') >= 2
    for label in ("1e-6", "1e-4", "0.01"):
        assert f">{label}</text>" in page
    table = Table(heads=["size", "samples/s"], rows=[["1", "5.0"], ["2", "9.0"]], best={(1, 0)})
    page = (write_result(config, "batch", {"found": 2}, table=table) / "find.html").read_text()
    assert page.index("<th>1<") < page.index('<tr class="chosen"><th>2<')


def test_rows_that_are_printed_one_by_one_stand_under_their_heads():
    trials = [MeasuredSize(1, 50.0, 0.25), MeasuredSize(64, None, 1.5, "out of memory")]
    whole = find_batch._table(trials).terminal(find_batch.WIDTH)
    lines = [find_batch._table([]).terminal(find_batch.WIDTH), *map(find_batch._line, trials)]
    assert lines == whole.splitlines()


def test_an_objective_that_needs_boxes_gets_them(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "voc", dict.fromkeys("abcd", xml(("dog", 5, 6, 25, 30))), {"train": [*"abcd"], "val": ["a"]})
    options = [text for text in tiny if not text.startswith("predictor.")]
    detect = ["objective=detect", "objective.width=8", "dataset=voc", f"dataset.root_path={tmp_path / 'voc'}"]
    assert main(["batch", *options, *detect, "dataset.split=train", "logger=none", "name=boxes"]) == 0
