"""Whole runs: the files that they write, how they stop, and that they resume exactly."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
from tiny_agent import TINY, agent

from jepa import JEPAAgent, JEPAConfig, load_encoder
from jepa.config import ConfigError
from jepa.errors import RunError
from jepa.runs.checkpoint import CheckpointError, find, load_model, with_checksum
from jepa.runs.metrics import read_rows

pytestmark = pytest.mark.slow


def weights(folder):
    return load_model(find(folder))


def assert_identical(first, second):
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    agent(folder, "steps=12", "eval_every=6", "save_every=4").train()
    return folder


def test_a_run_leaves_what_the_contract_says(finished):
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html"} <= {p.name for p in finished.iterdir()}
    assert (finished / "checkpoints" / "last").resolve().name == "step_00000012"
    rows = {row["step"]: row for row in read_rows(finished)}
    assert {"probe/knn_top1", "probe/linear_top1", "collapse/rank", "baseline/pixels_linear_top1"} <= rows[0].keys()
    names = {"train/loss", "train/lr", "train/momentum", "train/grad_norm", "train/weight_decay"}
    assert names | {"perf/samples_per_s", "perf/data_wait", "epoch", "samples"} <= rows[2].keys()
    assert {"probe/linear_top1", "predict/error", "predict/trivial_error"} <= rows[12].keys()
    assert rows[12]["samples"] == 12 * 16
    assert rows[12]["epoch"] == 2.0


def test_metrics_lines_hold_numbers_only(finished):
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert all(isinstance(value, int | float) or value is None for value in row.values())
        assert list(row)[:3] == ["step", "epoch", "samples"]


def test_a_finished_run_says_so_and_is_left_alone(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    agent(finished, "steps=12", "eval_every=6", "save_every=4").train()
    assert "finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_configuration_is_not_continued(finished):
    with pytest.raises(ConfigError, match="lr"):
        agent(finished, "steps=12", "lr=0.5").train()


def test_resume_false_refuses_an_existing_run(finished):
    with pytest.raises(ConfigError, match="resume"):
        agent(finished, "steps=12", "resume=false").train()


def test_the_encoder_is_loaded_from_the_run_and_from_a_checkpoint(finished):
    encoder = load_encoder(finished)
    assert not encoder.training
    assert encoder.embed_dim == 32
    pictures = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8)
    tokens = encoder(encoder.transform(pictures))
    assert tokens.shape == (3, 16, 32)
    other = load_encoder(finished / "checkpoints" / "step_00000012")
    assert torch.equal(other(other.transform(pictures)), tokens)
    trained = weights(finished)
    assert torch.equal(encoder.embed.weight, trained["target_encoder.embed.weight"])


@pytest.mark.parametrize(
    ("overrides", "encoder_of"),
    [
        (["objective=mae"], "encoder"),
        (["objective=vae", "objective.latent_dim=4"], "encoder"),
        (["objective.target=none", "regularizer=vicreg"], "context_encoder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_encoder_is_trained_resumed_and_loaded_whatever_it_predicts(overrides, encoder_of, tmp_path):
    unknown = {"objective=mae": "predictor.", "objective=vae": ("predictor.", "mask.")}.get(overrides[0], ())
    changes = [*(text for text in TINY if not text.startswith(unknown)), *overrides, "save_every=2", "eval_every=4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    JEPAAgent(JEPAConfig(*changes, "steps=4"), folder=whole).train()
    shutil.copytree(whole, parted, symlinks=True)
    for made in ("run.json", "checkpoints/step_00000004", "checkpoints/last"):
        path = parted / made
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (parted / "checkpoints" / "last").symlink_to("step_00000002")
    (parted / "run.json").write_text((whole / "run.json").read_text().replace("finished", "stopped"))
    JEPAAgent(JEPAConfig(*changes, "steps=4"), folder=parted).train()
    assert_identical(whole, parted)
    encoder = load_encoder(whole)
    assert torch.equal(encoder.embed.weight, weights(whole)[f"{encoder_of}.embed.weight"])


def test_the_encoder_takes_images_without_a_time_axis(finished):
    encoder = load_encoder(finished)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), encoder(images[:, :, None]))


def test_encode_gives_the_mean_token_of_images_of_any_size(finished):
    trained = agent(finished, "steps=12")
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in [(40, 60), (32, 32), (100, 33)]]
    vectors = trained.encode(images)
    assert vectors.shape == (3, 32)
    torch.testing.assert_close(vectors, trained.encoder(trained.encoder.transform(images)).mean(dim=1))


def test_a_checkpoint_that_names_foreign_code_is_refused(finished, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished / "checkpoints" / "step_00000012", copy], check=True)
    config = (copy / "config.yaml").read_text().replace("jepa.encoders.spatial.SpatialEncoder", "os.system")
    (copy / "config.yaml").write_text(config)
    state = json.loads((copy / "state.json").read_text())
    del state["digests"]["config.yaml"], state["encoder"]  # as in checkpoints without the node of the encoder
    (copy / "state.json").write_text(json.dumps(with_checksum(state)))
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load_encoder(copy)


def test_accumulation_trains_as_the_whole_batch_does(finished, tmp_path):
    agent(tmp_path / "pieces", "steps=12", "eval_every=6", "save_every=4", "micro_batch_size=4").train()
    whole, pieces = weights(finished), weights(tmp_path / "pieces")
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, tmp_path):
    options = ["steps=12", "eval_every=6", "save_every=4"]
    agent(tmp_path / "again", *options).train()
    assert_identical(finished, tmp_path / "again")
    agent(tmp_path / "other", *options, "seed=1").train()
    assert not torch.equal(
        weights(tmp_path / "other")["predictor.mask_tokens"], weights(finished)["predictor.mask_tokens"]
    )


def test_evaluating_more_often_does_not_change_the_training(finished, tmp_path):
    agent(tmp_path / "often", "steps=12", "eval_every=2", "save_every=4").train()
    assert_identical(finished, tmp_path / "often")


def start(folder, *overrides):
    output = folder.with_name("output")
    return forked.start(lambda: agent(folder, *overrides).train() and 0, folder.parent, output), output


def steps_logged(folder):
    file = Path(folder) / "metrics.jsonl"
    return file.read_text().count("train/loss") if file.exists() else 0


def wait_for(condition, process, output):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.exitcode is None, output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_killed_at_any_step_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    options = ["steps=60", "eval_every=30", "save_every=7", "log_every=1", "spike_guard=6", "encoder.drop_path=0.1"]
    killed, output = start(tmp_path / "killed", *options)
    wait_for(lambda: steps_logged(tmp_path / "killed") >= 23, killed, output)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    for name in ("killed", "whole"):
        agent(tmp_path / name, *options).train()
    assert_identical(tmp_path / "whole", tmp_path / "killed")
    steps = [row["step"] for row in read_rows(tmp_path / "killed")]
    assert steps == list(range(61))


class Stopped(NamedTuple):
    """A run that was stopped by SIGTERM, and the error of another one that was started on its folder meanwhile."""

    folder: Path
    output: str
    refusal: str


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    options = ["steps=5000", "eval_every=5000", "save_every=5000", "log_every=1"]
    process, output = start(folder, *options)
    wait_for(lambda: steps_logged(folder) >= 3, process, output)
    with pytest.raises(ConfigError) as refusal:
        agent(folder, *options).train()
    process.terminate()
    process.join(100)
    return Stopped(folder, output.read_text(), str(refusal.value))


def test_sigterm_finishes_the_step_saves_and_reports(stopped):
    assert "report" in stopped.output
    assert "stopped" in (stopped.folder / "report.html").read_text()
    saved = json.loads((stopped.folder / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert saved == read_rows(stopped.folder)[-1]["step"]


def test_a_second_job_on_a_running_folder_is_refused(stopped):
    assert "in use" in stopped.refusal


def test_a_loss_that_is_never_finite_stops_the_run_and_the_report_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="not finite"):
        agent(
            tmp_path / "run",
            "steps=100",
            "eval_every=100",
            "lr=1e30",
            "schedule.start_ratio=1",
            "clip_grad=null",
            "log_every=1",
        ).train()
    assert "not finite" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_names_the_keys_to_change(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("jepa.training.loop.one_step", full)
    with pytest.raises(RunError, match=r"out of memory: a rank takes .* GiB.*micro_batch_size=8 \(same result"):
        agent(tmp_path / "run", "steps=4", "evaluator=[]", "dataset.num_samples=16").train()
    assert "micro_batch_size=8" in (tmp_path / "run" / "report.html").read_text()


def test_a_data_set_smaller_than_the_batch_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size=128.*96"):
        agent(tmp_path / "run", "batch_size=128", "steps=2").train()


@pytest.mark.parametrize(
    "overrides",
    [
        ["mask=random"],
        ["predictor=cross_attention"],
        ["regularizer=vicreg"],
        ["regularizer=[vicreg,sigreg,cross_view]", "augment.views=2", "micro_batch_size=2"],
        ["predictor.joint=false"],
        ["objective.loss=l1"],
        ["schedule=wsd"],
        ["schedule=constant"],
        ["encoder.checkpoint_activations=true"],
    ],
)
def test_every_choice_trains(tmp_path, overrides):
    if "predictor=cross_attention" in overrides:
        overrides = [*overrides, "predictor.depth=1"]
    metrics = agent(tmp_path / "run", *overrides, "steps=2", "log_every=1", "evaluator=diagnostics").train()
    assert metrics["step"] == 2
    assert metrics["train/loss"] > 0


def test_features_that_are_not_finite_stop_the_run(tmp_path):
    options = ["steps=100", "eval_every=5", "lr=1e30", "schedule.start_ratio=1", "clip_grad=null"]
    with pytest.raises(RuntimeError, match="lower lr"):
        agent(tmp_path / "run", *options).train()
