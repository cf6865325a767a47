"""Shards by URL: the same samples as of files, one copy of each shard, and servers that fail."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from shard_server import ShardServer, serving
from tar_shards import batch_values, numbered, value_of, write_shard, write_shards

from jepa.config import ConfigError, compose
from jepa.data import remote, shard_cache, shard_index
from jepa.data.identity import identity
from jepa.data.loader import DataError, batches
from jepa.data.remote import RemoteFile, find_files, stat
from jepa.data.shard_cache import ShardCache
from jepa.data.shards import Shards
from jepa.errors import SourceError
from jepa.resources.estimate import find_dataset

pytest.importorskip("aiohttp")
COUNTS = (12, 7, 20, 9)
PATTERN = "train-{000..003}.tar"


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.002)
    remote._filesystem_of.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    write_shards(write_shards(tmp_path / "web", COUNTS), (6,), "val")
    with serving(tmp_path / "web") as running:
        yield running


def by_url(server: ShardServer, **options: object) -> Shards:
    return Shards(shards=f"{server.url}/{PATTERN}", **{"shuffle_shards": 2, **options})  # type: ignore[arg-type]


def files_in(cache: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.glob("[!.]*"))


def noise(folder: Path, name: str, count: int = 3, size: int = 400_000) -> Path:
    """A shard of large samples, which need not be pictures."""
    random = np.random.default_rng(0)
    return write_shard(
        folder / name, {f"{n}": {"png": random.bytes(size), "cls": str(n % 2).encode()} for n in range(count)}
    )


# --- the same data ---


def test_shards_by_url_are_the_data_of_the_same_files(server, tmp_path):
    far = by_url(server, val_shards=f"{server.url}/val-000.tar")
    near = Shards(shards=str(tmp_path / "web" / PATTERN), shuffle_shards=2)
    assert identity(far) == identity(near)
    assert identity(far.validation()) == identity(near.validation())
    assert batch_values(far, 14) == batch_values(near, 14)
    assert batch_values(far, 14, num_workers=2, first_step=3) == batch_values(near, 14, first_step=3)
    assert far.describe(12) == f"{server.url}/train-001.tar: 00012"


def test_each_shard_is_copied_once_by_all_workers_and_ranks(server):
    data = by_url(server)
    identity(data)
    server.whole.clear()
    server.delay = 0.01
    for rank in range(2):
        batch_values(data, 30, num_workers=2, batch_size=2, world_size=2, rank=rank)
    assert {name: round(float(count)) for name, count in server.whole.items()} == {
        f"train-{n:03d}.tar": 1 for n in range(4)
    }
    assert files_in(data.cache.folder) == [f"train-{n:03d}.tar" for n in range(4)]


def test_the_next_shards_are_copied_in_advance(server):
    data = by_url(server, shuffle_shards=1)
    order = data.index_order(4, seed=0)
    first = data.index["shard"][order(0)[0]]
    deadline = time.monotonic() + 10
    while len(files_in(data.cache.folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(files_in(data.cache.folder)) == 2
    assert data.paths[first].name in files_in(data.cache.folder)


def test_headers_of_large_samples_are_read_by_their_bytes_and_once(server, tmp_path):
    noise(tmp_path / "web", "large-0.tar")
    server.whole.clear()
    files, cache = find_files(f"{server.url}/large-0.tar"), ShardCache(None, 1)
    index = shard_index.read_index(files, None, "label", cache)
    assert index["label"].tolist() == [b"0", b"1", b"0"]
    assert server.whole["large-0.tar"] < 0.3
    before = len(server.requests)
    assert np.array_equal(shard_index.read_index(files, None, "label", cache), index)
    assert len(server.requests) == before


def test_a_few_samples_do_not_cost_whole_shards(server, tmp_path):
    noise(tmp_path / "web", "large-0.tar", count=100, size=20_000)
    data = Shards(shards=f"{server.url}/large-0.tar", cache_size=0.001)
    with pytest.raises((OSError, RuntimeError)):  # no picture
        data[50]
    assert len(data.read(3)) == 20_000
    assert files_in(data.cache.folder) == []


def test_the_log_says_where_the_data_and_the_cache_are(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        by_url(server, cache=str(tmp_path / "copies"), cache_size=3)
    assert (
        f"data: 4 files of 0.1 MB from {server.url}; cache: {tmp_path}/copies (holds 0.0 MB of at most 3 GB)"
        in caplog.text
    )
    assert "6 attempts at each request, 15 s to connect and 30 s without a byte" in caplog.text


def test_a_changed_shard_is_noticed(server, tmp_path):
    assert len(by_url(server)) == sum(COUNTS)
    write_shard(tmp_path / "web" / "train-000.tar", numbered(500, 3))
    data = by_url(server)
    assert len(data) == sum(COUNTS) - 12 + 3
    assert value_of(data[0][0]) == 500 % 256


def test_a_shard_that_changes_during_a_run_is_an_error(server, tmp_path):
    data = by_url(server)
    for number in range(4):
        path = tmp_path / "web" / f"train-{number:03d}.tar"
        os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match=r"train-00\d.tar: has changed since the run began"):
        data.cache.fetch(data.paths[0])


def test_classes_and_a_held_out_part_that_is_named(server, tmp_path):
    (tmp_path / "web" / "classes.txt").write_text("ant\nbee\ncow\n")
    data = by_url(server, val_shards=f"{server.url}/val-000.tar")
    assert data.classes == ("ant", "bee", "cow")
    assert len(data.validation() or ()) == 6
    assert by_url(server).validation() is None  # a web server cannot list


# --- file systems that list and store ---


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    import fsspec

    write_shards(write_shards(tmp_path / "web", COUNTS), (6,), "val")
    files = fsspec.filesystem("memory")
    files.put(f"{tmp_path}/web/", f"/{tmp_path.name}/", recursive=True)
    yield f"memory://{tmp_path.name}"
    files.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/train-*.tar", f"/{PATTERN}", "/{train-*,val-*}.tar"])
def test_folders_globs_and_braces_of_urls(memory, tmp_path, pattern):
    data = Shards(shards=memory + pattern)
    assert len(data) == sum(COUNTS)
    assert len(data.validation() or ()) == 6
    assert identity(data) == identity(Shards(shards=str(tmp_path / "web")))


def test_the_index_is_stored_beside_the_shards_and_found_there(memory, tmp_path, monkeypatch):
    import fsspec

    assert len(Shards(shards=memory)) == sum(COUNTS)
    stored = [name for name in fsspec.filesystem("memory").find(f"/{tmp_path.name}") if "/.index-" in name]
    assert len(stored) == 2  # of the training shards and of the held-out ones
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr(shard_index, "_read_all", lambda *_: pytest.fail("the headers are read again"))
    assert len(Shards(shards=memory)) == sum(COUNTS)


# --- failures ---


@pytest.mark.parametrize("answers", [[503, 503], ["cut"], [429, "cut", 500], [503] * 3])
def test_failures_that_pass_are_tried_again(server, caplog, answers):
    server.answers = list(answers)
    data = by_url(server)
    empty(data.cache)
    server.answers = list(answers)
    assert data.cache.fetch(data.paths[0])
    assert value_of(data[3][0]) == 3
    assert "attempt 2 of" in caplog.text


def test_a_connection_that_stalls_is_given_up_and_tried_again(server, monkeypatch):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    remote._filesystem_of.cache_clear()
    server.answers = ["stall"]
    begin = time.monotonic()
    assert len(by_url(server)) == sum(COUNTS)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (403, r"the server refuses access \(403\); check the URL and its permissions"),
        (404, "there is no such file; check the spelling"),
        (400, "the server answers 400"),
        (500, "the server answers 500 .*, also at attempt 4; see that the server runs"),
        ("cut", "the answer was cut off, also at attempt 6"),
    ],
)
def test_what_a_server_answers_is_named_with_the_url(server, answer, message):
    server.answers = [answer] * 1000
    with pytest.raises(SourceError, match=f"{server.url}/train-000.tar: .*{message}"):
        Shards(shards=f"{server.url}/train-000.tar")
    assert len(server.requests) <= 7


def test_a_web_page_and_a_server_without_sizes_are_no_data(server):
    server.page = "<html>log in</html>"
    with pytest.raises(SourceError, match=r"train-000.tar: the server answers with a web page"):
        by_url(server)


def test_a_cache_that_is_smaller_than_a_window_is_said(server, tmp_path, caplog):
    expected = batch_values(Shards(shards=str(tmp_path / "web" / PATTERN), shuffle_shards=2), 14)
    assert batch_values(by_url(server, cache_size=2.5e-5), 14) == expected
    assert "the 2 shards that are shuffled together have 0.1 MB, more than dataset.cache_size=2.5e-05" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_dies_ends_the_training_with_its_name(server, num_workers):
    data = by_url(server, cache_size=1e-6)  # no shard has room
    stream = batches(data, batch_size=4, seed=0, num_workers=num_workers)
    next(stream)
    server.stop()
    with pytest.raises((DataError, SourceError), match=rf"{server.url}/train-00\d.tar: .*also at attempt 6; see that"):
        list(islice(stream, 20))


def test_a_server_that_comes_back_is_waited_for(server, monkeypatch):
    data = by_url(server)
    server.stop()
    monkeypatch.setattr(remote, "PAUSE", 0.2)
    again = threading.Thread(target=lambda: (time.sleep(0.3), server.start()))
    again.start()
    assert value_of(data[3][0]) == 3


def test_a_full_cache_needs_no_server(server, caplog):
    expected = batch_values(by_url(server), 12)
    identity(by_url(server))
    batch_values(by_url(server), 12)
    server.stop()
    data = by_url(server)
    assert batch_values(data, 12, num_workers=2) == expected
    assert identity(data)["num_samples"] == sum(COUNTS)
    assert "what it answered at an earlier time is used" in caplog.text
    remote._silent_hosts().clear()


def test_a_server_without_ranges_sends_whole_files(server):
    server.has_ranges = False
    data = by_url(server)
    assert batch_values(data, 14) == batch_values(data, 14)
    requested = [name for name, _ in server.requests]
    assert files_in(data.cache.folder) == [f"train-{n:03d}.tar" for n in range(4)]
    assert len(requested) <= 4 * 3 + 1  # what it is, the copy, and if it is still the same; classes.txt
    server.answers = ["cut"] * 2
    empty(data.cache)
    assert data.cache.fetch(data.paths[0])


def empty(cache: ShardCache) -> None:
    for path in cache.folder.glob("[!.]*"):
        path.unlink()


# --- the cache ---


def remote_file(server: ShardServer, number: int) -> RemoteFile:
    return stat(f"{server.url}/train-{number:03d}.tar")


def test_the_least_recently_used_shards_go_first_and_those_in_use_stay(server, tmp_path, caplog):
    files = [remote_file(server, number) for number in range(4)]
    sizes = [file.size for file in files]
    cache = ShardCache(str(tmp_path / "copies"), (sizes[1] + sizes[2] + 10) / 1e9)
    assert cache.fetch(files[0])
    assert cache.fetch(files[1])
    now = time.time()
    for file, age in ((files[0], 300), (files[1], 600)):
        os.utime(cache.path(file), (now - age, now - age))
    cache.read(files[1], 1, 0)  # used just now
    assert cache.fetch(files[2])
    assert files_in(cache.folder) == ["train-001.tar", "train-002.tar"]
    assert not cache.fetch(files[3])  # all others were used within a minute
    assert "is full of files in use" in caplog.text
    assert not ShardCache(str(tmp_path / "small"), 1e-6).fetch(files[2])
    assert "are more than dataset.cache_size=1e-06; it is read sample by sample" in caplog.text


def test_the_disk_is_not_filled(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_cache, "SPARE_BYTES", 1 << 60)
    cache = ShardCache(str(tmp_path / "copies"), 1)
    assert not cache.fetch(remote_file(server, 0))
    assert "are free on the disk of the cache" in caplog.text


def test_a_disk_that_is_full_is_not_blamed_on_the_server(server, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk")

    server.has_ranges = False
    file = remote_file(server, 0)
    monkeypatch.setattr(remote._filesystem(file.url, whole=True)[0], "get_file", full)
    with pytest.raises(SourceError, match=r"the cache of the shards, .*: /disk: No space left .* make room there"):
        ShardCache(str(tmp_path / "copies"), 1).fetch(file)


def test_one_process_copies_and_the_others_wait(server, tmp_path):
    file, cache = remote_file(server, 2), ShardCache(str(tmp_path / "copies"), 1)
    server.whole.clear()
    server.delay = 0.05
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cache.fetch, args=(file,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert server.whole["train-002.tar"] < 1.1


def test_a_copy_that_was_killed_is_never_taken_for_a_whole_one(server, tmp_path, monkeypatch):
    file, cache = remote_file(server, 2), ShardCache(str(tmp_path / "copies"), 1)
    monkeypatch.setattr(shard_cache, "BLOCK_BYTES", 1000)
    server.delay = 0.05
    process = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(file,))
    process.start()
    deadline = time.monotonic() + 10
    while not list(cache.folder.glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(cache.folder.glob(".*.part"))
    assert cache.read(file, 1, 0) is None
    server.delay = 0
    assert cache.fetch(file)
    assert cache.path(file).read_bytes() == (tmp_path / "web" / "train-002.tar").read_bytes()
    assert not list(cache.folder.glob(".*.part"))


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"the cache of the shards, .*file: .*\(dataset.cache\)"):
        ShardCache(str(tmp_path / "file"), 1).fetch(remote_file(server, 0))


@pytest.mark.slow
def test_ctrl_c_is_answered_at_once_during_a_copy(server, tmp_path):
    program = (
        "import jepa.data.remote as r\nfrom jepa.data.shard_cache import ShardCache\n"
        f"file = r.stat('{server.url}/train-000.tar')\nprint('ready', flush=True)\n"
        "try: ShardCache(None, 1).fetch(file)\nexcept KeyboardInterrupt: print('stopped', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    server.delay = 0.3
    assert process.stdout.readline() == b"ready\n"
    server.answers = ["stall"] * 9
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"stopped\n"
    assert time.monotonic() - begin < 1
    process.kill()
    process.communicate()


# --- configuration ---


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/a.tar", r"there is no protocol s4://"),
        ("htps://host/a.tar", r'there is no protocol htps://; did you mean "https"'),
        ("s3:/bucket/a.tar", r"a URL begins with s3://, with two slashes"),
        ("file:///data/a.tar", "files of this machine are named by their path: /data/a.tar"),
        ("simplecache::memory://a.tar", "give one URL without ::"),
        ("https://host/page", "is the URL of no .tar"),
        ("https://host/a-*.tar", "a web server cannot list its files; name them in braces"),
    ],
)
def test_urls_that_cannot_be_read_are_refused_without_network(url, message):
    with pytest.raises(ConfigError, match=message):
        compose(["dataset=webdataset", f"dataset.shards='{url}'", "size=tiny"])


@pytest.mark.parametrize(
    ("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "'jepa-train\\[remote\\]'")]
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, protocol, package):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=f"{protocol}:// needs .*: pip install {package}"):
        compose(["dataset=webdataset", f"dataset.shards={protocol}://bucket/a.tar", "size=tiny"])


@pytest.mark.parametrize("data", ["webdataset dataset.shards", "hf dataset.path"])
def test_an_estimate_asks_no_server(monkeypatch, data):
    monkeypatch.setattr(remote, "retried", lambda *_: pytest.fail("a server is asked"))
    name, key = data.split()
    dataset, assumed = find_dataset(compose([f"dataset={name}", f"{key}=https://host/a.tar", "estimate=true"]))
    assert len(dataset) == 1_281_167
    assert "an estimate asks no server" in assumed


def test_secrets_of_a_url_are_not_shown():
    file = RemoteFile("https://user:secret@host/a.tar?signature=secret", 1, "")
    assert str(file) == "https://host/a.tar"
    assert file.identity == ("https://host/a.tar", 1, "")
    assert file.name == "a.tar"


def test_braces_of_urls_and_shards_that_are_not_there(server, memory):
    assert [file.name for file in find_files(f"{server.url}/train-00{{2,0}}.tar")] == ["train-002.tar", "train-000.tar"]
    with pytest.raises(SourceError, match=r"nothing-\*.tar: there is no file that matches"):
        Shards(shards=f"{memory}/nothing-*.tar")
    with pytest.raises(SourceError, match=r"train-004.tar: there is no such file"):
        Shards(shards=f"{server.url}/train-{{003..004}}.tar")
