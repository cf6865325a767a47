"""Logging of a run: always to its folder, optionally to W&B or TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from checked import checked
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from wandb_reader import read_offline_runs

from jepa import logger as logger_module
from jepa.evaluation.types import EmbeddingTable, Evaluation, Picture
from jepa.logger import TensorboardLogger, WandbLogger
from jepa.runs.metrics import FolderLogger, read_rows

TESTS = Path(__file__).parent
CONF = TESTS.parent / "conf" / "logger"
PLACE = {"epoch": 0.5, "samples": 640}


def wired(folder: Path, resume_step: int | None = None) -> dict:
    return {"folder": folder, "config": {"name": "trial", "lr": 0.1}, "run_id": "a1b2c3d4", "resume_step": resume_step}


def evaluation(channels: int = 3, width: int = 200, caption: str = "bright is the context") -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (12, 16, 3), generator=generator, dtype=torch.uint8)
    thumbnails = torch.randint(0, 255, (5, channels, 32, 32), generator=generator, dtype=torch.uint8)
    table = EmbeddingTable("embeddings", torch.randn(5, width, generator=generator), list("abcab"), thumbnails)
    return Evaluation(pictures=(Picture("masks", pixels, caption),), tables=(table,))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path_factory):
    """A home folder without API keys, and no environment variables of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))


class TestFolder:
    def test_a_row_begins_with_step_epoch_and_samples_and_holds_numbers_only(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        logger.log(10, {"train/loss": torch.tensor(0.25), "samples": 640, "perf/x": np.float32(2), "epoch": 0.5})
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert list(row) == ["step", "epoch", "samples", "train/loss", "perf/x"]
        assert list(row.values()) == [10, 0.5, 640, 0.25, 2.0]

    def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(self, tmp_path):
        FolderLogger(**wired(tmp_path)).log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
        row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
        assert row["train/loss"] is row["train/grad_norm"] is None
        assert math.isnan(read_rows(tmp_path)[0]["train/loss"])

    def test_a_row_is_on_disk_as_soon_as_it_is_logged(self, tmp_path):
        FolderLogger(**wired(tmp_path)).log(1, PLACE)
        assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")

    def test_lines_of_one_step_are_read_as_one_row_in_order_of_steps(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        for step, metrics in ((0, {"probe/x": 1}), (10, {"train/loss": 2}), (10, {"probe/x": 3})):
            logger.log(step, metrics)
        assert read_rows(tmp_path) == [{"step": 0, "probe/x": 1}, {"step": 10, "train/loss": 2, "probe/x": 3}]

    def test_a_folder_without_metrics_has_no_rows(self, tmp_path):
        assert read_rows(tmp_path) == []

    @pytest.mark.parametrize("cut", [1, 5, 12])
    def test_a_line_cut_off_by_a_kill_is_left_out_and_gone_after_a_resume(self, tmp_path, cut):
        logger = FolderLogger(**wired(tmp_path))
        for step in (1, 2, 3):
            logger.log(step, PLACE)
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        kept = 3 if cut == 1 else 2
        assert len(read_rows(tmp_path)) == kept
        FolderLogger(**wired(tmp_path, resume_step=3)).log(4, PLACE)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, kept + 1), 4]

    def test_damage_in_the_middle_is_named_with_its_line(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_rows(tmp_path)

    def test_a_resumed_run_has_every_step_once(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        for step in range(8):
            logger.log(step, {"train/loss": 1.0})
            logger.show(step, evaluation())
        resumed = FolderLogger(**wired(tmp_path, resume_step=4))
        for step in range(5, 8):
            resumed.log(step, {"train/loss": 2.0})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["train/loss"]) for row in lines] == [(s, 1.0 if s < 5 else 2.0) for s in range(8)]
        assert max((tmp_path / "media").iterdir()).name == "step_00000004"

    def test_a_run_that_starts_again_from_nothing_keeps_nothing(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        logger.log(0, PLACE)
        logger.show(0, evaluation())
        FolderLogger(**wired(tmp_path))
        assert read_rows(tmp_path) == []
        assert not list(tmp_path.glob("media/*"))

    def test_rewinding_leaves_the_old_rows_when_it_dies_half_way(self, tmp_path, monkeypatch):
        logger = FolderLogger(**wired(tmp_path))
        logger.log(1, PLACE)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            FolderLogger(**wired(tmp_path))
        assert (tmp_path / "earlier-1" / "metrics.jsonl").read_bytes() == before

    def test_pictures_are_kept_with_their_captions(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        logger.show(20, evaluation())
        logger.show(20, Evaluation(pictures=(Picture("features", torch.zeros(4, 4, 3, dtype=torch.uint8), "maps"),)))
        place = tmp_path / "media" / "step_00000020"
        captions = json.loads((place / "captions.json").read_text())
        assert captions == {"masks": "bright is the context", "features": "maps"}
        stored = torch.from_numpy(np.array(Image.open(place / "masks.png")))
        assert torch.equal(stored, evaluation().pictures[0].pixels)

    def test_no_name_of_a_picture_leaves_the_folder(self, tmp_path):
        pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
        pictures = tuple(Picture(name, pixels) for name in ("../../evil", "/etc/evil", "a/b", ".."))
        FolderLogger(**wired(tmp_path / "run")).show(0, Evaluation(pictures=pictures))
        assert len(list((tmp_path / "run" / "media" / "step_00000000").glob("*.png"))) == 4
        assert {path.name for path in tmp_path.iterdir()} == {"run"}

    def test_embeddings_are_kept_of_the_beginning_and_of_the_latest_evaluation(self, tmp_path):
        logger = FolderLogger(**wired(tmp_path))
        for step in (0, 5, 10):
            logger.show(step, evaluation())
        kept = sorted(tmp_path.glob("media/*/*.npz"))
        assert [path.parent.name for path in kept] == ["step_00000000", "step_00000010"]
        arrays = np.load(kept[-1])
        assert arrays["vectors"].shape == (5, 200)
        assert arrays["labels"].tolist() == list("abcab")

    def test_the_provenance_counts_the_sessions_of_a_run(self, tmp_path):
        FolderLogger(**wired(tmp_path)).close("stopped")
        FolderLogger(**wired(tmp_path, resume_step=7)).close("finished")
        facts = json.loads((tmp_path / "provenance.json").read_text())
        assert [session["from_step"] for session in facts["sessions"]] == [0, 7]
        assert facts["status"] == "finished"
        assert facts["run_id"] == "a1b2c3d4"
        assert facts["versions"]["torch"]


class TestWandb:
    def options(self, **changes) -> dict:
        return {"project": "jepa", "entity": None, "mode": None} | changes

    def test_without_a_key_the_whole_run_is_kept_offline_in_its_folder(self, tmp_path):
        logger = WandbLogger(**self.options(), **wired(tmp_path))
        for step in (0, 10):
            logger.log(step, PLACE | {"train/loss": 1.0 / (step + 1)})
            logger.show(step, evaluation())
        logger.close("finished")
        (run,) = read_offline_runs(tmp_path)
        assert (run.run_id, run.project, run.config["lr"]) == ("a1b2c3d4", "jepa", 0.1)
        assert {step: row["train/loss"] for step, row in run.rows.items()} == {0: 1.0, 10: 1 / 11}
        assert run.rows[10]["pictures/masks/_type"] == "image-file"
        assert run.rows[10]["pictures/masks/caption"] == "bright is the context"
        assert run.rows[10]["tables/embeddings/nrows"] == 5
        assert run.summary["status"] == "finished"
        assert run.exit_code == 0

    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_table_has_thumbnails_labels_and_whole_vectors_within_the_folder(self, tmp_path, channels):
        shown = evaluation(channels=channels)
        logger = WandbLogger(**self.options(), **wired(tmp_path))
        logger.show(10, shown)
        logger.close("finished")
        (run,) = read_offline_runs(tmp_path)
        assert all(path.is_relative_to(tmp_path) for path in run.artifact_files.values())
        table = json.loads(run.artifact_files["tables/embeddings.table.json"].read_text())
        assert table["columns"] == ["thumbnail", "label", "embedding"]
        assert [row[1] for row in table["data"]] == list("abcab")
        vectors = torch.tensor([row[2] for row in table["data"]])
        assert torch.allclose(vectors, shown.tables[0].vectors, atol=1e-4)
        thumbnail = Image.open(run.artifact_files[table["data"][0][0]["path"]])
        assert thumbnail.size == (32, 32)

    def test_a_resumed_run_has_the_same_identity_and_goes_on_counting(self, tmp_path):
        for resume_step, steps in ((None, (1, 2)), (2, (3, 4))):
            logger = WandbLogger(**self.options(), **wired(tmp_path, resume_step))
            for step in steps:
                logger.log(step, PLACE)
            logger.close("stopped")
        runs = read_offline_runs(tmp_path)
        assert {run.run_id for run in runs} == {"a1b2c3d4"}
        assert sorted(step for run in runs for step in run.rows) == [1, 2, 3, 4]

    @pytest.mark.parametrize(("status", "code"), [("failed", 1), ("stopped", 255)])
    def test_a_run_that_did_not_finish_says_so(self, tmp_path, status, code):
        logger = WandbLogger(**self.options(), **wired(tmp_path))
        logger.log(1, PLACE)
        logger.close(status)
        (run,) = read_offline_runs(tmp_path)
        assert (run.summary["status"], run.exit_code) == (status, code)

    def test_online_without_a_key_is_announced_and_kept_offline(self, tmp_path, caplog):
        WandbLogger(**self.options(mode="online"), **wired(tmp_path)).close("finished")
        assert "no API key" in caplog.text
        assert len(read_offline_runs(tmp_path)) == 1

    def test_an_unreachable_server_is_announced_and_the_run_kept_offline(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setitem(logger_module.SECONDS, "init_timeout", 1)
        logger = WandbLogger(**self.options(), **wired(tmp_path))
        logger.log(1, PLACE)
        logger.close("finished")
        assert "cannot be reached" in caplog.text
        assert any(1 in run.rows for run in read_offline_runs(tmp_path))

    def test_the_environment_can_disable_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "disabled")
        logger = WandbLogger(**self.options(), **wired(tmp_path))
        logger.log(1, PLACE)
        logger.show(1, evaluation())
        logger.close("finished")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("variables", "netrc", "found"),
        [
            ({}, "", False),
            ({"WANDB_API_KEY": "x"}, "", True),
            ({}, "machine api.wandb.ai login user password x\n", True),
            ({}, "machine example.org login user password x\n", False),
        ],
    )
    def test_a_key_is_found_in_the_environment_and_in_netrc(self, tmp_path, monkeypatch, variables, netrc, found):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text(netrc)
        assert logger_module._has_key() is found

    @pytest.mark.parametrize("changes", [{"mode": "onlin"}, {"run_id": "a/b"}])
    def test_a_wrong_argument_is_refused_by_name(self, tmp_path, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            checked(WandbLogger, **self.options() | wired(tmp_path) | changes)

    @pytest.mark.slow
    def test_rows_survive_forked_workers_and_a_kill(self, tmp_path):
        done = self.run_script(
            tmp_path,
            """
            import multiprocessing, os, signal, time
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.1,))
            child.start()
            for step in range(200):
                logger.log(step, {"train/loss": 1.0})
            logger.show(199, Evaluation())
            child.join()
            time.sleep(2.0)
            os.kill(os.getpid(), signal.SIGKILL)
            """,
        )
        assert done.returncode == -signal.SIGKILL
        (run,) = read_offline_runs(tmp_path)
        assert sorted(run.rows) == list(range(200))
        assert run.exit_code is None

    @pytest.mark.slow
    def test_losing_the_process_of_wandb_is_announced_and_the_training_goes_on(self, tmp_path):
        done = self.run_script(
            tmp_path,
            """
            import os, signal, time
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            time.sleep(0.5)
            for step in range(3):
                logger.log(step, {"train/loss": 1.0})
            logger.close("finished")
            print("trained", len(children))
            """,
        )
        assert "trained 1" in done.stdout
        assert done.stderr.count("W&B failed") == 1

    def run_script(self, folder: Path, body: str) -> subprocess.CompletedProcess:
        start = f"""
        from pathlib import Path
        from jepa.logger import WandbLogger
        from jepa.evaluation.types import Evaluation
        logger = WandbLogger(project="jepa", entity=None, mode=None, folder=Path({str(folder)!r}), config={{}},
                             run_id="a1b2c3d4", resume_step=None)
        """
        script = textwrap.dedent(start) + textwrap.dedent(body)
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=250
        )


class TestTensorboard:
    def test_scalars_pictures_and_the_projector_are_written(self, tmp_path):
        logger = TensorboardLogger(**wired(tmp_path))
        logger.log(10, {"train/loss": 0.5})
        logger.show(10, evaluation(channels=1))
        logger.close("finished")
        events = self.events(tmp_path)
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5)]
        assert events.Tags()["images"] == ["pictures/masks"]
        assert len(list(tmp_path.rglob("tensors.tsv"))) == 1
        assert len(list(tmp_path.rglob("metadata.tsv"))) == 1

    def test_a_resumed_run_shows_every_step_once(self, tmp_path):
        for resume_step, steps in ((None, range(8)), (4, range(5, 8))):
            logger = TensorboardLogger(**wired(tmp_path, resume_step))
            for step in steps:
                logger.log(step, {"train/loss": 1.0})
            logger.close("stopped")
        assert [event.step for event in self.events(tmp_path).Scalars("train/loss")] == list(range(8))

    def test_a_missing_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
        with pytest.raises(ValueError, match=r"jepa-train\[tensorboard\]"):
            TensorboardLogger(**wired(tmp_path))

    def events(self, folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_of_logger_logs_shows_and_closes(path, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for node in (OmegaConf.load(path) or {}).values():
        logger = instantiate(node, _partial_=True, _convert_="all")(**wired(tmp_path))
        logger.log(0, PLACE | {"train/loss": math.nan})
        logger.show(0, evaluation())
        logger.show(0, Evaluation())
        logger.close("finished")
    assert not caplog.records


@pytest.mark.slow
def test_the_folder_and_its_report_need_no_torch():
    script = "import sys, jepa.runs.metrics, jepa.reports.run, jepa.logger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
