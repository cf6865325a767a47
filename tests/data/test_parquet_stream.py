"""Parquet files of a server as a stream: a length and an order without copying them, then file after file."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_server import serving

from jepa.config import ConfigError, compose
from jepa.data import remote
from jepa.data.huggingface import HuggingFaceImages
from jepa.data.identity import identity
from jepa.data.loader import DataError, batches
from jepa.errors import SourceError

datasets = pytest.importorskip("datasets")
pytest.importorskip("aiohttp")
NUM_ROWS = 12


def write(file: Path, values: range, **columns: Any) -> None:
    images = []
    for value in values:
        stream = BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, format="png")
        images.append({"bytes": stream.getvalue(), "path": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = {"label": [value % 3 for value in values]}
    datasets.Dataset.from_dict({"image": images, **labels, **columns}).to_parquet(file, batch_size=5)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(remote, "PAUSE", 0.002)
    remote._filesystem_of.cache_clear()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    import fsspec

    for number in range(5):
        write(tmp_path / "set" / f"train-{number}.parquet", range(number * NUM_ROWS, (number + 1) * NUM_ROWS))
    write(tmp_path / "set" / "test-0.parquet", range(200, 210))
    files = fsspec.filesystem("memory")
    files.put(f"{tmp_path}/set/", f"/{tmp_path.name}/", recursive=True)
    yield f"memory://{tmp_path.name}"
    files.rm(f"/{tmp_path.name}", recursive=True)


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache/jepa-train/shards").glob("[!.]*"))


def value(data: HuggingFaceImages, index: int) -> int:
    return int(data[index][0][0, 0, 0, 0])


def batch_values(data: HuggingFaceImages, steps: int, **options: Any) -> list[list[int]]:
    stream = batches(data, **{"batch_size": 4, "seed": 0, "num_workers": 0, **options})
    values = [batch.pixels[:, 0, 0, 0, 0].tolist() for batch in islice(stream, steps)]
    stream.close()
    return values


def test_length_labels_and_identity_are_known_before_any_file_is_copied(url, tmp_path):
    data = HuggingFaceImages(path=url, shuffle_shards=2)
    held_out = data.validation()
    assert held_out is not None
    assert (len(data), len(held_out), data.classes) == (60, 10, ("0", "1", "2"))
    assert data.labels.tolist() == [n % 3 for n in range(60)]
    assert identity(data)["num_samples"] == 60
    assert data.describe(13) == f"memory:///{tmp_path.name}/train-1.parquet row 1"
    assert copies(tmp_path) == []


def test_every_row_is_the_one_of_the_local_file(url, tmp_path):
    data, near = HuggingFaceImages(path=url), HuggingFaceImages(path=str(tmp_path / "set"))
    assert [value(data, n) for n in range(60)] == [value(near, n) for n in range(60)] == list(range(60))
    far_part, near_part = data.validation(), near.validation()
    assert far_part is not None
    assert near_part is not None
    assert [value(far_part, n) for n in range(10)] == [value(near_part, n) for n in range(10)]


def test_a_stream_is_read_two_files_at_a_time_and_resumes_exactly(url, tmp_path):
    data = HuggingFaceImages(path=url, shuffle_shards=2)
    whole = batch_values(data, 20)
    epoch = [number for batch in whole[:15] for number in batch]
    assert sorted(epoch) == list(range(60))
    assert len({number // NUM_ROWS for number in epoch[: 2 * NUM_ROWS]}) == 2
    assert whole[0] != sorted(whole[0])
    for first in (1, 7, 16):
        assert batch_values(data, 3, first_step=first) == whole[first : first + 3]
    assert batch_values(data, 12, num_workers=2, first_step=4) == whole[4:16]


def test_probes_see_the_first_files_only(url, tmp_path):
    data = HuggingFaceImages(path=url, shuffle_shards=2)
    probed = data.probe_dataset
    assert probed is not None
    assert (len(probed), len(probed.validation() or ())) == (2 * NUM_ROWS, 10)
    assert value(probed, 13) == 13
    assert copies(tmp_path) == ["train-1.parquet"]
    assert HuggingFaceImages(path=url, shuffle_shards=None).probe_dataset is None


def test_a_file_of_a_web_server_and_one_that_dies(url, tmp_path):
    with serving(tmp_path / "set") as server:
        server.answers = [503]
        data = HuggingFaceImages(path=f"{server.url}/train-{{0..4}}.parquet", shuffle_shards=2)
        assert [value(data, n) for n in (0, 59)] == [0, 59]
        server.stop()
        with pytest.raises((DataError, SourceError), match=r"train-\d.parquet: .*also at attempt"):
            batch_values(data, 15)


def test_files_that_cannot_be_streamed_are_refused_by_name(url, tmp_path):
    (tmp_path / "set" / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with serving(tmp_path / "set") as server:
        with pytest.raises(SourceError, match=r"broken.parquet: is not readable as parquet"):
            HuggingFaceImages(path=f"{server.url}/broken.parquet")
        write(tmp_path / "set" / "train-other.parquet", range(3), colour=["red", "red", "blue"])
        with pytest.raises(SourceError, match=r"other.parquet has the columns .*colour, .* give files of one kind"):
            HuggingFaceImages(path=f"{server.url}/train-{{0,other}}.parquet")
        server.has_ranges = False
        with pytest.raises(SourceError, match=r"train-0.parquet: the server sends whole files only; download them"):
            HuggingFaceImages(path=f"{server.url}/train-0.parquet")
    with pytest.raises(SourceError, match=r"there is no file \*\*/\*.parquet"):
        HuggingFaceImages(path=f"{url}/nothing")


def test_files_without_room_in_the_cache_are_an_error(url):
    with pytest.raises(SourceError, match=r"can be copied whole only, and its .* raise dataset.cache_size"):
        value(HuggingFaceImages(path=url, cache_size=1e-6), 0)


def test_stream_is_for_servers(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset.stream=true: .* is on this machine and is read there"):
        compose(["dataset=hf", f"dataset.path={tmp_path}", "dataset.stream=true", "size=tiny"])
    with pytest.raises(ConfigError, match=r"dataset.path=s4://b/x: there is no protocol s4://"):
        compose(["dataset=hf", "dataset.path=s4://b/x", "size=tiny"])


def test_a_name_on_the_hub_stands_for_its_parquet_files(url, tmp_path, monkeypatch):
    asked = []

    def listed(pattern: str) -> list[remote.RemoteFile]:
        asked.append(pattern)
        return []

    def found(pattern: str, in_folder: str) -> list[remote.RemoteFile]:
        asked.append(f"{pattern} {in_folder}")
        return real(url, in_folder)

    real = remote.find_files
    monkeypatch.setattr("jepa.data.huggingface.list_files", listed)
    monkeypatch.setattr("jepa.data.huggingface.find_files", found)
    assert len(HuggingFaceImages(path="org/name", stream=True)) == 60
    assert asked == [
        "hf://datasets/org/name/**/*.parquet",
        "hf://datasets/org/name@refs%2Fconvert%2Fparquet **/*.parquet",
    ]
