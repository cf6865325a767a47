"""The verdict on runs with hand-made metrics."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jepa.reports.run import final_table
from jepa.reports.verdict import collapse_alarm, initial_weights, series, verdict

HEALTHY = {"collapse/std": 0.5, "collapse/cosine": 0.6, "collapse/rank": 20.0, "collapse/rank_centred": 30.0}
START = {"collapse/std": 0.3, "collapse/cosine": 0.9, "collapse/rank": 5.0, "collapse/rank_centred": 25.0}
COLLAPSED = {"collapse/std": 0.003, "collapse/cosine": 0.9999, "collapse/rank": 1.0, "collapse/rank_centred": 12.0}
FLAT = {"collapse/std": 0.3, "collapse/cosine": 0.9, "collapse/rank": 1.6, "collapse/rank_centred": 1.3}


def run(*evaluations, losses=()):
    """Rows of evaluations at steps 0, 100, 200, ... and of training losses between them."""
    rows = [{"step": 100 * index, **values} for index, values in enumerate(evaluations)]
    rows += [{"step": 10 + 10 * index, "train/loss": loss, "train/lr": 1e-3} for index, loss in enumerate(losses)]
    return sorted(rows, key=lambda row: row["step"])


def probes(linear, knn):
    return {"probe/linear_top1": linear, "probe/knn_top1": knn}


def test_a_probe_that_rose_above_step_0_is_learning_and_the_reason_has_the_points():
    said = verdict(run(START | probes(30.0, 28.0), HEALTHY | probes(52.5, 45.0)))
    assert said.word == "learning"
    assert "linear probe is at 52.5 %, 22.5 points above the untrained encoder's 30.0 %" in said.reason
    assert "kNN probe is at 45.0 %, 17.0 points above" in said.reason


def test_the_reason_puts_raw_pixels_beside_the_probe():
    rows = run(START | probes(30.0, 28.0) | {"baseline/pixels_linear_top1": 41.0}, HEALTHY | probes(52.5, 45.0))
    assert "(raw pixels: 41.0 %)" in verdict(rows).reason


def test_a_loss_that_falls_and_then_rises_does_not_change_a_verdict():
    evaluations = (START | probes(30.0, 28.0), HEALTHY | probes(52.5, 45.0))
    healthy = [0.9, 0.5, 0.1, 0.05, 0.1, 0.2, 0.3, 0.35]
    assert verdict(run(*evaluations, losses=healthy)) == verdict(run(*evaluations))


def test_a_flat_probe_without_collapse_is_stalled():
    said = verdict(run(START | probes(30.0, 28.0), HEALTHY | probes(31.0, 28.5)))
    assert said.word == "stalled"
    assert "1.0 points above" in said.reason


def test_a_gain_of_one_probe_that_the_other_one_lost_is_no_learning():
    assert verdict(run(START | probes(30.0, 28.0), HEALTHY | probes(22.0, 31.0))).word == "stalled"


def test_equal_vectors_for_all_images_are_collapsing_though_the_prediction_gain_is_high():
    rows = run(
        START | probes(30.0, 28.0) | {"predict/gain": 0.0},
        COLLAPSED | probes(24.0, 20.0) | {"predict/gain": 0.97},
    )
    said = verdict(rows)
    assert said.word == "collapsing"
    assert "1% of its start (0.3 -> 0.003)" in said.reason
    assert "10.0 points" not in said.reason
    assert "6.0 points below" in said.reason


def test_features_on_a_line_are_collapsing_though_their_std_is_intact():
    said = verdict(run(START | probes(30.0, 28.0), FLAT | probes(29.0, 27.0)))
    assert said.word == "collapsing"
    assert "only 1.3 directions" in said.reason


def test_a_collapse_after_a_good_start_is_seen_against_the_best_value():
    rows = run(START | probes(30.0, 28.0), HEALTHY | probes(45.0, 40.0), COLLAPSED | probes(34.0, 28.0))
    said = verdict(rows)
    assert said.word == "collapsing"
    assert "value at step 100" in said.reason
    assert "down from 45.0 % at step 100" in said.reason


def test_the_early_dip_of_a_healthy_run_raises_no_alarm():
    dip = {"collapse/std": 0.06, "collapse/cosine": 0.996, "collapse/rank_centred": 3.6}
    assert collapse_alarm(run(START, dip)) is None
    said = verdict(run(START | probes(30.0, 28.0), dip | probes(29.0, 25.0)))
    assert said.word == "stalled"
    assert "std at 20% of its start" in said.reason


def test_a_deep_dip_that_is_being_left_is_no_collapse():
    deep = {"collapse/std": 0.01, "collapse/cosine": 0.9999, "collapse/rank_centred": 12.0}
    rising = {"collapse/std": 0.025, "collapse/cosine": 0.9994, "collapse/rank_centred": 12.0}
    assert collapse_alarm(run(START, deep)) is not None
    assert collapse_alarm(run(START, deep, rising)) is None
    assert collapse_alarm(run(START, deep, deep)) is not None


def test_features_that_only_shrink_are_not_collapsing():
    shrunk = START | {"collapse/std": 0.01, "collapse/norm": 0.1}
    assert verdict(run(START | probes(30.0, 28.0), shrunk | probes(45.0, 40.0))).word == "learning"
    assert collapse_alarm(run(START, shrunk)) is None


def test_a_large_kept_gain_outweighs_suspicious_features_but_they_are_mentioned():
    said = verdict(run(START | probes(30.0, 28.0), COLLAPSED | probes(45.0, 40.0)))
    assert said.word == "learning"
    assert "but the std of the features fell" in said.reason


@pytest.mark.parametrize("rows", [[], run(START | probes(30.0, 28.0)), run(losses=[0.5, 0.4])])
def test_before_the_second_evaluation_it_is_too_early_to_tell(rows):
    assert verdict(rows).word == "too early to tell"
    assert collapse_alarm(rows) is None


def test_without_labels_the_prediction_decides_while_the_features_stay_spread_out():
    before, after = {"predict/gain": 0.02}, {"predict/gain": 0.4}
    assert verdict(run(START | before, HEALTHY | after)).word == "learning"
    assert verdict(run(START | before, HEALTHY | {"predict/gain": 0.05})).word == "stalled"
    assert verdict(run(START | before, COLLAPSED | after)).word == "collapsing"
    assert "without labels" in verdict(run(START | before, HEALTHY | after)).reason


def test_without_labels_a_predictor_worse_than_a_constant_at_step_0_must_beat_the_constant_to_count():
    assert verdict(run(START | {"predict/gain": -1.0}, HEALTHY | {"predict/gain": -0.2})).word == "stalled"


def test_the_alarm_names_real_keys_with_values_for_this_run():
    rows = run(START, COLLAPSED)
    rows.append({"step": 50, "train/lr": 3e-3, "train/momentum": 0.996})
    text = collapse_alarm(rows)
    assert text is not None
    for advice in (
        "lr=0.001",
        "objective.momentum=0.999 ",
        "regularizer=vicreg",
        "schedule.weight_decay",
        "warmup_ratio",
    ):
        assert advice in text


def test_the_alarm_speaks_of_momentum_only_where_the_objective_has_one():
    assert "momentum" not in (collapse_alarm(run(START, COLLAPSED)) or "momentum")


def test_the_alarm_is_silent_for_healthy_features():
    assert collapse_alarm(run(START, HEALTHY)) is None


def test_the_table_has_the_three_rows_and_a_dash_where_nothing_was_measured():
    baseline = {"baseline/pixels_knn_top1": 25.0, "baseline/pixels_linear_top1": 33.3}
    rows = run(START | probes(30.0, 28.0) | baseline, HEALTHY | probes(52.5, 45.0))
    table = final_table(rows).terminal().splitlines()
    assert [line.split() for line in table] == [
        ["kNN", "linear", "rank"],
        ["untrained", "encoder", "28.0", "%", "30.0", "%", "5.0"],
        ["raw", "pixels", "25.0", "%", "33.3", "%", "-"],
        ["trained", "encoder,", "step", "100", "45.0", "%", "52.5", "%", "20.0"],
    ]
    assert len({len(line) for line in table}) == 1


def test_an_encoder_that_began_with_weights_is_not_called_untrained():
    weights = "outputs/first"
    assert (
        initial_weights({"encoder": {"weights": weights, "fresh": True}})
        == initial_weights({"encoder": {}})
        == "untrained"
    )
    start = initial_weights({"encoder": {"weights": weights, "fresh": False}})
    rows = run(START | probes(30.0, 28.0), HEALTHY | probes(52.5, 45.0))
    assert final_table(rows, start).terminal().splitlines()[1].split()[:2] == ["loaded", "encoder"]
    assert "points above the loaded encoder's 30.0 %" in verdict(rows, start).reason
    assert "untrained" not in final_table(rows, start).terminal() + verdict(rows, start).reason


def test_an_empty_run_has_a_table_of_dashes():
    assert final_table([]).terminal().count("-") == 9


def test_of_a_step_written_twice_the_later_row_counts_and_what_is_not_finite_is_left_out():
    rows = [{"step": 5, "a": 1.0}, {"step": 3, "a": 0.5}, {"step": 5, "a": 2.0}, {"step": 7, "a": math.nan}]
    assert series(rows, "a") == [(3, 0.5), (5, 2.0)]


@pytest.mark.slow
def test_the_verdict_needs_no_torch():
    code = "import jepa.reports.verdict, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    source = Path(sys.modules[verdict.__module__].__file__ or "").read_text()
    imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert not any(name and name.startswith("jepa") for name in imported)


def test_raw_pixels_that_are_still_ahead_are_named_so() -> None:
    rows = [
        {"step": 0, "probe/linear_top1": 27.4, "collapse/std": 0.15, "baseline/pixels_linear_top1": 78.2},
        {"step": 9, "probe/linear_top1": 53.5, "collapse/std": 0.13},
    ]
    result = verdict(rows)
    assert result.word == "behind raw pixels"
    assert "(raw pixels: 78.2 %, still ahead)" in result.reason


def test_a_regression_probe_that_rose_clearly_is_learning_where_the_class_probes_did_not() -> None:
    before, after = {"probe/velocity_r2": -30.0}, {"probe/velocity_r2": 41.0}
    said = verdict(run(START | probes(30.0, 28.0) | before, HEALTHY | probes(30.5, 28.0) | after))
    assert said.word == "learning"
    assert "R² of the velocity probe is at 41.0 %, 71.0 points above" in said.reason
    assert verdict(run(START | before, HEALTHY | after)).word == "learning"


def test_an_r2_that_only_comes_up_to_the_mean_is_no_learning() -> None:
    rows = run(START | {"probe/velocity_r2": -30.0}, HEALTHY | {"probe/velocity_r2": 1.0})
    assert verdict(rows).word == "stalled"


def test_a_gain_of_one_regression_that_another_lost_is_no_learning() -> None:
    before, after = (
        {"probe/position_r2": position, "probe/velocity_r2": velocity}
        for position, velocity in ((60.0, 10.0), (40.0, 25.0))
    )
    assert verdict(run(START | before, HEALTHY | after)).word == "stalled"


def test_the_reason_and_the_table_put_the_middle_frame_beside_the_probes() -> None:
    last = {"probe/position_r2": 80.0, "still/position_r2": 70.0, "probe/velocity_r2": 60.0, "still/velocity_r2": 2.0}
    rows = run(START | {"probe/position_r2": 30.0, "probe/velocity_r2": 1.0}, HEALTHY | last)
    assert "(middle frame only: 70.0 %)" in verdict(rows).reason
    assert [line.split() for line in final_table(rows).terminal().splitlines()] == [
        ["position", "R²", "velocity", "R²", "rank"],
        ["untrained", "encoder", "30.0", "%", "1.0", "%", "5.0"],
        ["raw", "pixels", "-", "-", "-"],
        ["trained,", "middle", "frame", "only", "70.0", "%", "2.0", "%", "-"],
        ["trained", "encoder,", "step", "100", "80.0", "%", "60.0", "%", "20.0"],
    ]


def test_where_classes_are_uneven_the_table_shows_balanced_accuracy() -> None:
    rows = run(START | probes(80.0, 80.0), HEALTHY | probes(82.0, 81.0) | {"probe/linear_balanced": 55.5})
    assert "linear bal." in final_table(rows).terminal()
    assert "55.5 %" in final_table(rows).terminal()
    assert "82.0 %" not in final_table(rows).terminal()


def test_a_few_samples_are_too_few_for_any_verdict():
    for count, is_enough in ((3, False), (16, False), (20, True), (2048, True)):
        size = {"perf/evaluation_samples": float(count)}
        for end in (HEALTHY | probes(52.5, 45.0), HEALTHY | probes(30.0, 28.0), COLLAPSED, FLAT):
            rows = run(START | probes(30.0, 28.0) | size, end | size)
            assert (verdict(rows).word != "too few to tell") == is_enough
            assert is_enough or collapse_alarm(rows) is None
            assert is_enough or f"only {count} held-out samples" in verdict(rows).reason


def test_a_few_samples_without_a_second_evaluation_are_too_early_to_tell():
    assert verdict(run(START | {"perf/evaluation_samples": 3.0})).word == "too early to tell"


def test_evaluations_that_measured_nothing_are_no_missing_evaluations():
    counted = {"perf/evaluation_samples": 100.0}
    said = verdict(run(counted, counted))
    assert said.word == "too few to tell"
    assert "no evaluation had the labels or boxes" in said.reason


def test_a_world_model_is_compared_with_copying_and_with_other_actions():
    def errors(error, copy, shuffled):
        values = {"error": error, "copy_error": copy, "shuffled_error": shuffled}
        far = {f"predict/{name}_h4": 2 * value for name, value in values.items()}
        return {"predict/gain": 1 - error} | {f"predict/{name}": value for name, value in values.items()} | far

    rows = run(START | errors(0.9, 0.5, 0.9), HEALTHY | errors(0.2, 0.4, 0.3))
    rows.append({"step": 110, "train/loss": 0.1})
    reason = verdict(rows).reason
    assert "after 4 steps the error is 0.50 of that of copying the last frame" in reason
    assert "1.50 times as large with the actions of other samples" in reason
    table = final_table(rows)
    assert list(table.heads) == ["", "error", "of copying", "with other actions", "rank"]
    assert table.rows[-1][1:4] == ["0.200", "0.400", "0.300"]
