"""The loader: order, resuming, broken samples, workers."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from jepa.data.loader import BrokenSamples, DataError, _BatchReader, batches, choose_num_workers, downscale
from jepa.types import Field, RawBatch, Sample


class Numbers:
    """Sample i is a picture of the value i with label i; `broken` ones can't be read."""

    classes = ()
    channels = 3
    mean = std = (0.5, 0.5, 0.5)

    def __init__(
        self, count: int, broken: tuple[int, ...] = (), sizes: tuple[tuple[int, int], ...] = ((4, 6),)
    ) -> None:
        self.count, self.broken, self.sizes = count, broken, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.broken:
            raise OSError(f"cannot read number {index}\nand more lines")
        return torch.full((3, 1, *self.sizes[index % len(self.sizes)]), index % 256, dtype=torch.uint8), index

    def describe(self, index: int) -> str:
        return f"number {index}"

    def validation(self) -> None:
        return None


class Seeds(Numbers):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], torch.initial_seed() % 2**62


class KilledWorker(Numbers):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Pids(Numbers):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], os.getpid()


def labels(dataset, steps: int, **arguments) -> list[list[int]]:
    defaults = {"batch_size": 4, "seed": 0, "num_workers": 0}
    stream = batches(dataset, **defaults | arguments)
    batch_labels = [batch.labels.tolist() for batch in islice(stream, steps)]
    stream.close()
    return batch_labels


def flat(lists: list[list[int]]) -> list[int]:
    return [item for part in lists for item in part]


def tensors(batch: RawBatch) -> list[torch.Tensor]:
    return [batch.pixels, batch.sizes, *batch.fields.values(), batch.broken, batch.parts]


def test_every_epoch_is_another_permutation_of_all_samples():
    order = flat(labels(Numbers(10), 5))  # two epochs; the third batch is of both
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_the_seed_decides_the_order():
    assert labels(Numbers(50), 4, seed=1) == labels(Numbers(50), 4, seed=1)
    assert labels(Numbers(50), 4, seed=1) != labels(Numbers(50), 4, seed=2)


@pytest.mark.parametrize("first_step", [0, 1, 7, 12, 1000])
def test_starting_at_a_step_continues_the_uninterrupted_run(first_step):
    whole = labels(Numbers(11, broken=(3,)), first_step + 3)
    assert labels(Numbers(11, broken=(3,)), 3, first_step=first_step) == whole[first_step:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_read_the_same_samples_for_any_world_size(world_size):
    single = labels(Numbers(17), 6, batch_size=8)
    ranks = [
        labels(Numbers(17), 6, batch_size=8 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [sorted(flat(list(parts))) for parts in zip(*ranks, strict=True)] == [sorted(batch) for batch in single]


def test_workers_do_not_change_the_batches():
    dataset = Numbers(23, broken=(5, 6), sizes=((4, 6), (9, 2)))
    stream, workers = (batches(dataset, batch_size=4, seed=3, num_workers=n, first_step=2) for n in (0, 2))
    for one, other in zip(islice(stream, 12), workers, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    workers.close()


def test_samples_of_different_sizes_are_padded_and_keep_their_size():
    batch = next(batches(Numbers(8, sizes=((4, 6), (9, 2))), batch_size=8, seed=0, num_workers=0))
    assert batch.pixels.shape == (8, 3, 1, 9, 6)
    assert batch.pixels.dtype == torch.uint8
    for pixels, (height, width), label in zip(batch.pixels, batch.sizes.tolist(), batch.labels, strict=True):
        assert (height, width) == ((4, 6), (9, 2))[label % 2]
        assert (pixels[..., :height, :width] == label).all()
        assert pixels.sum() == pixels[..., :height, :width].sum()


def test_images_with_a_larger_short_side_are_downscaled():
    dataset = Numbers(4, sizes=((40, 60), (12, 8)))
    batch = next(batches(dataset, batch_size=4, seed=0, num_workers=0, short_side=10))
    assert {tuple(size) for size in batch.sizes.tolist()} == {(10, 15), (12, 8)}


@pytest.mark.parametrize(("size", "expected"), [((8, 300), (8, 40)), ((300, 20), (40, 10)), ((1, 1), (1, 1))])
def test_a_panorama_keeps_its_centre(size, expected):
    clip = torch.zeros(3, 1, *size, dtype=torch.uint8)
    clip[..., size[0] // 2, size[1] // 2] = 255
    small = downscale(clip, short_side=10)
    assert small.shape[-2:] == expected
    peak = small[0, 0].flatten().argmax().item()
    assert abs(peak // expected[1] - expected[0] // 2) <= 1
    assert abs(peak % expected[1] - expected[1] // 2) <= 1


def test_downscaling_is_antialiased():
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(3, 1, 64, 64)
    assert (downscale(stripes, short_side=16)[..., 1:-1].float() - 127.5).abs().max() <= 1


def test_a_broken_sample_is_reported_and_replaced_by_the_next_readable_one():
    dataset = Numbers(10, broken=(2, 3, 9))
    batch = next(batches(dataset, batch_size=10, seed=0, num_workers=0))
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 4, 4, 4, 5, 6, 7, 8]
    assert set(batch.broken.tolist()) == {2, 3, 9}


class WithFields(Numbers):
    """Sample i has i % 3 of the ragged `marks` [m, 2] and one `action` [3], all of value i."""

    fields = {
        "marks": Field(shape=(2,), ragged=True, padding=-7.0),
        "action": Field(shape=(3,), dtype="int64"),
    }

    def __getitem__(self, index):
        fields = {"marks": torch.full((index % 3, 2), index), "action": torch.full((3,), index)}
        return Sample(*super().__getitem__(index), fields)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_declared_fields_are_stacked_or_padded_to_the_longest(num_workers):
    stream = batches(WithFields(9), batch_size=9, seed=0, num_workers=num_workers, fields=WithFields.fields)
    batch = next(stream)
    stream.close()
    marks, action = batch.fields["marks"], batch.fields["action"]
    assert (marks.shape, marks.dtype) == ((9, 2, 2), torch.float32)
    assert (action.shape, action.dtype) == ((9, 3), torch.int64)
    for index, rows, values in zip(batch.labels.tolist(), marks, action, strict=True):
        assert rows.tolist() == [[index] * 2] * (index % 3) + [[-7, -7]] * (2 - index % 3)
        assert values.tolist() == [index] * 3


def test_only_the_requested_fields_are_delivered():
    fields = {"action": WithFields.fields["action"]}
    assert next(batches(WithFields(4), batch_size=4, seed=0, num_workers=0)).fields.keys() == {"labels"}
    assert next(batches(WithFields(4), batch_size=4, seed=0, num_workers=0, fields=fields)).fields.keys() == {
        "labels",
        "action",
    }


@pytest.mark.parametrize(
    ("field", "actual"), [(Field(shape=(4,)), r"shape \[3\]"), (Field(ragged=True, shape=(3,)), r"shape \[3\]")]
)
def test_a_field_of_another_shape_than_declared_is_refused(field, actual):
    with pytest.raises(DataError, match=f"action.*{actual}"):
        next(batches(WithFields(4), batch_size=4, seed=0, num_workers=0, fields={"action": field}))


def test_a_declared_field_that_a_sample_lacks_is_refused():
    with pytest.raises(DataError, match=r"reward.*has none"):
        next(batches(WithFields(4), batch_size=4, seed=0, num_workers=0, fields={"reward": Field()}))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_for_unreadable_data_names_a_sample(num_workers):
    stream = batches(Numbers(10, broken=tuple(range(10))), batch_size=4, seed=0, num_workers=num_workers)
    with pytest.raises(DataError, match=r"10 samples in a row.*number \d: cannot read number \d$"):
        next(stream)


def test_each_broken_sample_is_warned_of_once_with_its_name_and_reason(caplog):
    broken = BrokenSamples(Numbers(1000, broken=(7, 8)))
    with caplog.at_level(logging.WARNING):
        for indices in ([7, 7], [], [8, 7]):
            broken.add(torch.tensor(indices, dtype=torch.long))
    assert len(broken.indices) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"left out: number {index}: cannot read number {index}" for index in (7, 8)
    ]


def test_more_than_one_percent_broken_stops_the_run():
    broken = BrokenSamples(Numbers(200, broken=(7, 8, 9)))
    broken.add(torch.tensor([7, 8]))
    broken.add(torch.tensor([7]))
    with pytest.raises(DataError, match=r"3 of 200 samples.*number 9"):
        broken.add(torch.tensor([9]))


@pytest.mark.parametrize("count", [2, 10, 99])
def test_one_broken_sample_ends_no_run_on_a_small_data_set_but_two_do(count):
    broken = BrokenSamples(Numbers(count, broken=(0, 1)))
    broken.add(torch.tensor([0, 0]))
    with pytest.raises(DataError, match=f"2 of {count} samples can't be read"):
        broken.add(torch.tensor([1]))


def test_a_data_set_smaller_than_the_batch_is_refused_with_both_numbers_before_anything_is_read():
    with pytest.raises(ValueError, match=r"7 samples.*batch_size=8.*lower batch_size to 7"):
        batches(Numbers(7), batch_size=4, world_size=2, seed=0)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"rank": 1}, {"world_size": 0}, {"num_workers": -1}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        batches(Numbers(50), **{"batch_size": 2, "seed": 0} | arguments)


def test_data_in_memory_need_no_workers_and_others_get_a_core_each(monkeypatch):
    dataset = Numbers(4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert choose_num_workers(dataset) == 8
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert choose_num_workers(dataset) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert choose_num_workers(dataset) == 0
    dataset.in_memory = True
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert choose_num_workers(dataset) == 0


def test_the_reader_of_a_worker_can_be_pickled():
    reader = pickle.loads(pickle.dumps(_BatchReader(Numbers(8), short_side=10)))
    assert reader[[(3, 0), (5, 0)]].labels.tolist() == [3, 5]


def test_workers_of_all_ranks_have_different_seeds():
    seeds = {
        seed
        for rank in range(2)
        for seed in flat(labels(Seeds(64), 6, batch_size=2, rank=rank, world_size=2, num_workers=2))
    }
    assert len(seeds) == 4


def test_the_global_random_state_is_unchanged():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    labels(Numbers(20), 2, num_workers=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("end", ["close", "delete"])
def test_no_worker_outlives_the_iterator(end):
    stream = batches(Pids(40), batch_size=4, seed=0, num_workers=2)
    pids = set(flat([next(stream).labels.tolist() for _ in range(4)]))
    assert len(pids) == 2
    stream.close() if end == "close" else None
    del stream
    assert not [child for child in multiprocessing.active_children() if child.pid in pids]


def test_a_killed_worker_is_an_error_and_not_a_hang():
    with pytest.raises(DataError, match="num_workers"):
        next(batches(KilledWorker(10), batch_size=2, seed=0, num_workers=1))


@pytest.mark.parametrize("name", ["INT", "USR1", "TERM"])
def test_a_worker_ignores_signals_to_the_whole_job(name):
    stream = batches(Pids(400), batch_size=2, seed=0, num_workers=1)
    (pid,) = set(next(stream).labels.tolist())
    subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    for _ in range(6):
        assert set(next(stream).labels.tolist()) == {pid}
    stream.close()


def test_a_worker_ends_when_its_parent_terminates_it():
    stream = batches(Pids(40), batch_size=2, seed=0, num_workers=1)
    (pid,) = set(next(stream).labels.tolist())
    worker = next(child for child in multiprocessing.active_children() if child.pid == pid)
    worker.terminate()
    worker.join(timeout=20)
    assert not worker.is_alive()


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with SIGINT ignored
sys.path.insert(0, sys.argv[1])
from test_loader import Numbers
from jepa.data.loader import batches
stream = batches(Numbers(40), batch_size=2, seed=0, num_workers=1)
next(stream)
os.killpg(0, signal.SIGINT)
for batch in stream:
    pass
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_program_with_one_traceback():
    command = [sys.executable, "-c", INTERRUPTED, os.path.dirname(__file__)]
    ended = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=250)
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.strip().endswith("KeyboardInterrupt")


class NeverAnswers(Numbers):
    """Names the process that reads, and waits."""

    file = Path()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.file.write_text(str(os.getpid()))
        time.sleep(60)
        return super().__getitem__(index)


def test_a_worker_that_waits_for_data_ends_with_its_parent(tmp_path):
    file = tmp_path / "pid"
    data = NeverAnswers(8)
    data.file = file
    stream = batches(data, batch_size=4, seed=0, num_workers=1)
    parent = multiprocessing.get_context("fork").Process(target=next, args=(stream,))
    parent.start()
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.join()
    while Path(f"/proc/{file.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{file.read_text()}").exists()
