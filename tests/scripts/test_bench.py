"""The benchmark: what it prints, that its parts add up, and that it counts the arithmetic right."""

import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench
from bench import Stopwatch, count_tokens, main, median_ratio, take_turns
from bench_reference import ClipStep, ImageStep, find_reference
from jepa.config import compose
from jepa.types import Masks, MaskSets

SIZES = {"tokens": 16, "patch": 8 * 8 * 3, "width": 32, "depth": 2, "inner": 16, "inner_depth": 1}


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines of the bench on a tiny model with a random mask, whose sizes do not vary."""
    lines: list[str] = []
    overrides = [
        "mask=random",
        "batch_size=4",
        "image_size=32",
        "encoder.patch_size=8",
        "encoder.embed_dim=32",
        "encoder.depth=2",
        "encoder.num_heads=2",
        "predictor.width=16",
        "predictor.depth=1",
        "num_workers=0",
        "precision=fp32",
        "device=cpu",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(str(words[0]).splitlines()))
        assert main(["--steps", "2", *overrides]) == 0
    return lines


def test_the_last_line_is_json_and_the_table_shows_the_same(printed):
    report = json.loads(printed[-1])
    assert set(report["ms"]) == set(bench.PARTS)
    for name in ("samples_per_s", "step_ms", "peak_memory_mb", "gflops_per_sample", "matmul_share"):
        assert report[name] > 0
        assert any(line.split() == [name, str(report[name])] for line in printed[:-1])


def test_every_part_of_a_step_takes_its_time(printed):
    assert all(spent > 0 for spent in json.loads(printed[-1])["ms"].values())


def test_arithmetic_is_counted_as_a_closed_form_says(printed):
    n, k = SIZES["tokens"], 4
    width, inner = SIZES["width"], SIZES["inner"]

    def trunk(tokens: int, dim: int, depth: int, linear: float, attention: float) -> float:
        return depth * (24 * tokens * dim**2 * linear + 4 * tokens**2 * dim * attention)

    embed = 2 * SIZES["patch"] * width
    target = n * embed + trunk(n, width, SIZES["depth"], linear=1, attention=1)
    # backward: twice the forward for a product, 2.5 times for fused attention, which computes its weights again
    context = 2 * k * embed + trunk(k, width, SIZES["depth"], linear=3, attention=3.5)  # no gradient for pixels
    predictor = 3 * 2 * n * width * inner + trunk(n, inner, SIZES["inner_depth"], linear=3, attention=3.5)
    assert json.loads(printed[-1])["gflops_per_sample"] == pytest.approx((target + context + predictor) / 1e9, rel=1e-3)


def test_parts_end_where_the_next_begin(monkeypatch):
    ticks = count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    watch = Stopwatch(SimpleNamespace(synchronize=lambda: None))
    for part in ("data", "mask", "data", "data", "backward"):
        watch.enter(part)
    assert watch.stop() == {"data": 3, "mask": 1, "backward": 1}
    assert watch.stop() == {}


def test_sides_take_turns_after_a_warm_up():
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "AB"}
    turns = take_turns(SimpleNamespace(seconds=lambda work: work() or len(order)), sides, 2)
    assert "".join(order) == "ABABAB"
    assert turns == {"A": [3, 5], "B": [4, 6]}


def test_a_ratio_is_the_median_of_the_pairs():
    assert median_ratio([2.0, 30.0, 9.0], [1.0, 10.0, 1.0]) == 3.0
    assert median_ratio(None, [1.0]) is None


def test_a_folder_that_is_no_reference_is_refused(tmp_path, capsys):
    assert main(["--reference", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("step", [ImageStep, ClipStep])
def test_a_reference_is_told_by_its_content(tmp_path, step):
    mark = tmp_path / step.MARK
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert find_reference(tmp_path) is step


@pytest.mark.parametrize("step", [ImageStep, ClipStep])
def test_the_sizes_of_a_comparison_are_a_valid_configuration(step):
    compose([*step.SAME_TASK, *step.SIZES])


def test_tokens_are_counted_by_mask_set():
    few, many = (Masks(torch.zeros(2, k), torch.zeros(2, 3, j)) for k, j in ((4, 5), (6, 7)))
    assert count_tokens(few) == {"context_tokens": 4, "target_tokens": 5}
    assert count_tokens(MaskSets([few, many])) == {"context_tokens": [4, 6], "target_tokens": [5, 7]}


def test_a_wrong_override_is_refused(capsys):
    assert main(["encoder.dept=3"]) == 2
    assert "encoder.depth" in capsys.readouterr().err
