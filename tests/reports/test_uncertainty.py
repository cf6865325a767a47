"""Verdicts know their uncertainty, name each metric as the table does, and put no tick where a baseline is ahead."""

from __future__ import annotations

import pytest

from jepa.reports.run import SIGNS, TONES, final_table
from jepa.reports.verdict import Verdict, verdict

SPREAD = {"collapse/std": 0.4, "collapse/cosine": 0.7, "collapse/rank": 9.0, "collapse/rank_centred": 30.0}


def judged(before: dict[str, float], after: dict[str, float], samples: int | None = 2048) -> Verdict:
    size = {} if samples is None else {"perf/evaluation_samples": float(samples)}
    return verdict([{"step": 0, **SPREAD, **size, **before}, {"step": 100, **SPREAD, **size, **after}])


def linear(value: float) -> dict[str, float]:
    return {"probe/linear_top1": value}


@pytest.mark.parametrize(
    ("samples", "gain", "word"),
    [(100, 8, "unclear"), (100, 20, "learning"), (2048, 8, "learning"), (2048, 2.5, "unclear"), (20000, 3, "learning")],
)
def test_the_same_gain_is_clear_or_not_by_the_number_of_samples(samples: int, gain: float, word: str) -> None:
    result = judged(linear(30.0), linear(30.0 + gain), samples)
    assert result.word == word
    assert word != "unclear" or f"with {samples:,} evaluated samples, a difference below" in result.reason


def test_no_gain_is_stalled_on_many_samples_and_unclear_on_few() -> None:
    assert judged(linear(30.0), linear(30.2), 2048).word == "stalled"
    assert judged(linear(30.0), linear(30.2), 100).word == "unclear"
    assert judged(linear(30.0), linear(30.2), None).word == "stalled", "rows of earlier versions do not say how many"


def test_the_best_of_several_probes_needs_a_larger_gain_than_one_alone() -> None:
    gain = 3.2  # points
    one = judged(linear(30.0), linear(30.0 + gain), 1700)
    others = {"probe/knn_top1": 30.0, "probe/attentive_top1": 30.0}
    assert one.word == "learning"
    assert judged(linear(30.0) | others, linear(30.0 + gain) | others, 1700).word == "unclear"


def test_an_r2_of_few_samples_is_unclear() -> None:
    assert judged({"probe/speed_r2": 20.0}, {"probe/speed_r2": 28.0}, 60).word == "unclear"
    assert judged({"probe/speed_r2": 20.0}, {"probe/speed_r2": 28.0}, 5000).word == "learning"


def test_what_is_behind_raw_pixels_or_a_constant_gets_no_tick() -> None:
    pixels = {"baseline/pixels_linear_top1": 78.0}
    behind = judged(linear(27.0) | pixels, linear(54.0))
    assert behind.word == "behind raw pixels"
    assert "(raw pixels: 78.0 %, still ahead)" in behind.reason
    constant = judged(linear(2.0) | {"baseline/constant_top1": 10.0}, linear(9.0))
    assert constant.word == "no better than a constant"
    assert "always the largest class: 10.0 %" in constant.reason
    assert SIGNS[TONES[behind.word]] == SIGNS[TONES[constant.word]] == SIGNS[TONES["unclear"]] != SIGNS["good"]
    assert judged(linear(27.0) | pixels, linear(81.0)).word == "learning"
    knn = {"probe/knn_top1": 60.0, "baseline/pixels_knn_top1": 40.0}
    assert judged(linear(27.0) | pixels | knn, linear(54.0) | knn).word == "behind raw pixels", (
        "the best of each counts"
    )


def test_a_motion_that_raw_pixels_do_not_show_is_learned_though_they_show_places() -> None:
    pixels = {"baseline/pixels_position_r2": 90.0, "baseline/pixels_speed_r2": 1.0}
    result = judged(
        {"probe/position_r2": 40.0, "probe/speed_r2": 0.0} | pixels, {"probe/position_r2": 80.0, "probe/speed_r2": 50.0}
    )
    assert result.word == "learning"


def test_the_sentence_and_the_table_have_the_same_number_under_the_same_name() -> None:
    before = linear(60.0) | {"probe/linear_balanced": 30.0, "probe/knn_top1": 60.0, "probe/knn_balanced": 31.0}
    after = linear(75.0) | {"probe/linear_balanced": 52.8, "probe/knn_top1": 70.0, "probe/knn_balanced": 45.0}
    result = judged(before, after)
    assert "linear probe (balanced) is at 52.8 %, 22.8 points above" in result.reason
    assert "75.0" not in result.reason
    table = final_table([{"step": 0, **before}, {"step": 100, **after}])
    assert table.heads[2] == "linear bal."
    assert table.rows[-1][2] == "52.8 %"


def test_a_prediction_worse_than_a_constant_is_told_by_its_error() -> None:
    reason = judged({"predict/gain": -8.06}, {"predict/gain": 0.25}).reason
    assert "beats a constant by 25% (step 0: has 9.1 times the error of a constant)" in reason
    assert "-806" not in reason


def test_loaded_weights_are_not_called_an_untrained_classifier() -> None:
    rows = [{"step": 0, "probe/classifier_top1": 10.0}, {"step": 9, "probe/classifier_top1": 50.0}]
    assert final_table(rows, "loaded").rows[0][0] == "loaded encoder, untrained head"
    assert final_table(rows, "untrained").rows[0][0] == "untrained classifier"
