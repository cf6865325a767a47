"""What resuming finds in a run folder, and that nothing in it is lost."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time

import pytest
from tiny_agent import TINY, agent

from jepa import JEPAConfig
from jepa.config import ConfigError
from jepa.errors import RunError
from jepa.parallel.session import open_session
from jepa.runs import folder as run_folder
from jepa.runs import metrics
from jepa.runs.checkpoint import CheckpointError, find, read_state, with_checksum
from jepa.runs.folder import open_folder
from jepa.runs.metrics import FolderLogger, read_rows

SHORT = ("steps=4", "save_every=2", "eval_every=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "finished"
    agent(folder, *SHORT).train()
    return folder


def opened(path, resume=True):
    return open_folder(path, config={}, resume=resume, session=open_session(device="cpu", precision="fp32"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with opened(tmp_path / "run") as folder:
        assert folder.status == "running"
    assert [record.message for record in caplog.records if "has no locks" in record.message]


def test_a_folder_in_use_is_refused_all_the_same(tmp_path):
    with opened(tmp_path), pytest.raises(ConfigError, match="in use"), opened(tmp_path):
        pass


@pytest.mark.parametrize("number", sorted(run_folder.FULL_OR_READ_ONLY))
def test_a_disk_that_takes_no_more_is_named_in_one_sentence(tmp_path, number):
    where = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(RunError, match=f"{where} cannot be written") as raised, opened(tmp_path / "run"):
        raise OSError(number, os.strerror(number), str(where))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["config.yaml", "provenance.json", "run.json"])
def test_a_disk_that_is_full_before_the_first_metrics_ends_the_run_in_one_sentence(tmp_path, monkeypatch, when):
    write = metrics.write_atomically

    def full(path, text):
        if path.name == when:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(metrics, "write_atomically", full)
    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(RunError, match=rf"{when} cannot be written \(No space left on device\)"):
        agent(tmp_path / "run", *SHORT).train()


def test_metrics_without_a_checkpoint_are_kept(tmp_path, caplog):
    for attempt in (1, 2):
        logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
        logger.log(attempt * 10, {"train/loss": 1.0})
        (tmp_path / "media" / f"step_{attempt:08d}").mkdir(parents=True)
        logger.close("stopped")
    with caplog.at_level(logging.WARNING):
        FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None).close("stopped")
    assert "no checkpoint" in caplog.text
    assert [read_rows(tmp_path / f"earlier-{n}")[0]["step"] for n in (1, 2)] == [10, 20]
    assert (tmp_path / "earlier-2" / "media" / "step_00000002").is_dir()
    assert read_rows(tmp_path) == []


def test_an_attempt_that_ended_before_its_first_step_is_replaced(tmp_path):
    for _ in range(2):
        logger = FolderLogger(folder=tmp_path, config={}, run_id="a", resume_step=None)
        logger.log(0, {"probe/knn_top1": 1.0})
        logger.close("stopped")
    assert len(read_rows(tmp_path)) == 1
    assert not (tmp_path / "earlier-1").exists()


@pytest.mark.slow
def test_a_run_copied_without_links_goes_on_where_it_was(finished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("last", "best"))
    rows = read_rows(copy)
    agent(copy, "steps=6", "save_every=2", "eval_every=4").train()
    assert "the run resumes from the newest checkpoint, step_00000004" in caplog.text
    assert [row["step"] for row in read_rows(copy)] == [0, 2, 4, 6]
    assert read_rows(copy)[:2] == rows[:2]
    assert find(copy).name == "step_00000006"


@pytest.mark.slow
def test_a_zipped_run_goes_on_where_it_was(finished, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "run"), "zip", finished)
    shutil.unpack_archive(archive, tmp_path / "copy")
    agent(tmp_path / "copy", "steps=6", "save_every=2", "eval_every=4").train()
    assert [row["step"] for row in read_rows(tmp_path / "copy")] == [0, 2, 4, 6]


@pytest.mark.slow
def test_more_steps_train_a_finished_run_further_and_say_what_the_schedule_does(finished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    with caplog.at_level(logging.INFO):
        agent(copy, "steps=6", "save_every=3", "eval_every=6", "log_every=1", "keep=1").train()
    assert "steps: 4 -> 6" in caplog.text
    assert "schedule" in caplog.text
    assert find(copy).name == "step_00000006"
    with pytest.raises(ConfigError, match=r"has trained 6 steps already.*end after 4"):
        agent(copy, *SHORT).train()


@pytest.mark.slow
def test_more_epochs_are_no_other_configuration_and_other_keys_are_named(tmp_path):
    folder = tmp_path / "run"
    agent(folder, "epochs=1", "eval_every=null").train()
    agent(folder, "epochs=2", "eval_every=null", "num_workers=1").train()
    assert find(folder).name == "step_00000012"
    with pytest.raises(ConfigError, match=r"another configuration \(lr: 0.001 -> 0.5\)|\(lr: .* -> 0.5\)"):
        agent(folder, "epochs=2", "lr=0.5").train()


@pytest.mark.slow
def test_epochs_do_not_matter_where_steps_are_given(finished, capsys):
    agent(finished, *SHORT, "epochs=77").train()
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("status", ["stopped", "finished"])
def test_resume_previous_takes_the_checkpoint_before_a_damaged_one(finished, tmp_path, status):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    (find(copy) / "state.json").write_text("{")
    (copy / "run.json").write_text(json.dumps({"run_id": "a", "status": status, "message": ""}))
    with pytest.raises(CheckpointError, match=r"step_00000004.*step_00000002 is whole.*resume=previous"):
        agent(copy, *SHORT).train()
    for _ in range(2):  # the same command does not go back again
        agent(copy, *SHORT, "resume=previous").train()
        assert find(copy).name == "step_00000004"
    assert (copy / "checkpoints" / "damaged-step_00000004").is_dir()
    assert [row["step"] for row in read_rows(copy)] == [0, 2, 4]


@pytest.mark.slow
def test_a_run_whose_states_do_not_name_the_best_checkpoint_goes_on(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    (copy / "checkpoints" / "best").unlink(missing_ok=True)
    for path in copy.glob("checkpoints/step_*/state.json"):
        state = json.loads(path.read_text())
        del state["best"]
        path.write_text(json.dumps(with_checksum(state)))
    agent(copy, "steps=6", "save_every=2", "eval_every=2").train()
    assert read_state(find(copy))["best"]["step"] == 6
    assert (copy / "checkpoints" / "best").resolve().name == "step_00000006"


def test_a_damaged_record_of_the_ending_is_no_reason_to_remove_the_run(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with (
        pytest.raises(ConfigError, match=r"run\.json cannot be read.*remove that file, and the run goes on"),
        opened(tmp_path),
    ):
        pass
    (tmp_path / "run.json").unlink()
    with opened(tmp_path) as folder:
        assert folder.status == "running"


def test_other_values_of_resume_are_refused():
    with pytest.raises(ConfigError, match=r"resume=newest.*previous"):
        JEPAConfig(*TINY, "resume=newest").compose()


@pytest.mark.parametrize("is_alive", [False, True])
def test_workers_of_a_killed_process_are_waited_for_and_a_living_owner_is_not(tmp_path, is_alive):
    """The child owns the folder; its own child, which holds the lock too, outlives it by half a second."""
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        with opened(tmp_path / "run"):
            if (worker := os.fork()) == 0:
                time.sleep(1.0)
                os._exit(0)
            os.write(writing, b"x")
            if is_alive:
                os.waitpid(worker, 0)
            os._exit(0)
    os.read(reading, 1)
    begun = time.monotonic()
    if is_alive:
        with pytest.raises(ConfigError, match="in use by another training process"), opened(tmp_path / "run"):
            pass
        assert time.monotonic() - begun < 0.8
        os.waitpid(owner, 0)
    else:
        os.waitpid(owner, 0)
        with opened(tmp_path / "run"):
            assert 0.2 < time.monotonic() - begun < 8
