"""Tar shards: index, order of the samples, and errors for damaged files."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checked import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_shards import batch_values, numbered, png, value_of, write_shard, write_shards

from jepa import JEPAAgent, JEPAConfig
from jepa.config.paths import find_shards
from jepa.data.images import ImageFolder
from jepa.data.loader import batches
from jepa.data.mixture import Mixture
from jepa.data.shard_index import members_of, opened
from jepa.data.shards import Shards, window_shuffle
from jepa.runs.metrics import read_rows

# --- patterns ---


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train-{000..002}.tar", ["train-000", "train-001", "train-002"]),
        ("train-00{2,0}.tar", ["train-002", "train-000"]),
        ("{train,val}-00{0..1}.tar", ["train-000", "train-001", "val-000", "val-001"]),
        ("*-001.tar", ["train-001", "val-001"]),
        ("train-001.tar", ["train-001"]),
        ("", ["train-000", "train-001", "train-002", "val-000", "val-001"]),
    ],
)
def test_shards_are_given_by_braces_globs_folders_and_files(tmp_path, pattern, expected):
    for name in ("train-000", "train-001", "train-002", "val-000", "val-001"):
        (tmp_path / f"{name}.tar").touch()
    assert [path.stem for path in find_shards(str(tmp_path / pattern))] == expected


def test_numbers_in_braces_are_as_wide_as_they_are_written(tmp_path):
    for number in (8, 9, 10):
        (tmp_path / f"a{number}.tar").touch()
        (tmp_path / f"b{number:04d}.tar").touch()
    assert [p.stem for p in find_shards(f"{tmp_path}/a{{8..10}}.tar")] == ["a8", "a9", "a10"]
    assert [p.stem for p in find_shards(f"{tmp_path}/b{{0008..0010}}.tar")] == ["b0008", "b0009", "b0010"]


def test_missing_and_compressed_shards_are_named(tmp_path):
    write_shards(tmp_path, (1, 1))
    with pytest.raises(ValueError, match=r"there is no .*train-002.tar \(2 of 4 are missing\)"):
        find_shards(f"{tmp_path}/train-{{000..003}}.tar")
    (tmp_path / "packed.tar.gz").touch()
    with pytest.raises(ValueError, match=r"packed.tar.gz is no .tar; unpack"):
        find_shards(f"{tmp_path}/packed*")
    with pytest.raises(ValueError, match=r"no .tar file"):
        find_shards(f"{tmp_path}/nothing*")


def test_a_brace_expanded_by_the_shell_is_warned_of(tmp_path, caplog):
    write_shards(tmp_path, (4, 4))
    Shards(shards=f"{tmp_path}/train-001.tar")
    assert "one of 2 that are numbered alike; a shell expands braces" in caplog.text


# --- samples ---


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_headers_are_read_as_by_tarfile(tmp_path, tar_format):
    names = ["short", "deep/er/" + "n" * 80, "f" * 60 + "/" + "g" * 90]
    names += [] if tar_format == tarfile.USTAR_FORMAT else ["x" * 300, "schön/ñandú"]
    path = write_shard(
        tmp_path / "a.tar", {n: {"png": os.urandom(k * 300), "cls": b"1"} for k, n in enumerate(names)}, tar_format
    )
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    with opened(path) as tar:
        assert [tuple(member) for member in members_of(*tar)] == expected


def test_an_archive_of_gnu_tar_is_read(tmp_path):
    for number in range(3):
        for suffix, data in numbered(number, 1)[f"{number:05d}"].items():
            path = tmp_path / "cat" / f"{number}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "shards").mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", "shards/a.tar", "./cat"], cwd=tmp_path, check=True)
    data = Shards(shards=str(tmp_path / "shards"))
    assert [(value_of(clip), label) for clip, label in (data[i] for i in range(len(data)))] == [(0, 0), (1, 1), (2, 2)]
    assert data.describe(1) == f"{tmp_path}/shards/a.tar: cat/1"


def test_samples_are_those_of_the_same_files_in_a_folder(tmp_path):
    samples = numbered(0, 12)
    write_shard(tmp_path / "shards" / "a.tar", dict(list(samples.items())[:5]))
    write_shard(tmp_path / "shards" / "b.tar", dict(list(samples.items())[5:]))
    for key, members in samples.items():
        path = tmp_path / "folder" / "train" / members["cls"].decode() / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members["png"])
    for channels in (1, 3):
        shards = Shards(shards=str(tmp_path / "shards"), channels=channels)
        folder = ImageFolder(root_path=str(tmp_path / "folder"), image_folder="train", channels=channels)
        in_folder = {Path(folder.describe(i)).stem: folder[i] for i in range(len(folder))}
        assert len(shards) == len(folder)
        assert (shards.classes, shards.mean, shards.std) == (folder.classes, folder.mean, folder.std)
        for i in range(len(shards)):
            clip, label = shards[i]
            expected, expected_label = in_folder[shards.describe(i).rpartition(" ")[2]]
            assert torch.equal(clip, expected)
            assert label == expected_label


def test_members_need_no_order_and_only_the_first_dot_ends_a_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("v1.0/b.cls", b"1"), ("v1.0/a.seg.png", png(9)), ("v1.0/a.PNG", png(1)),
                           ("v1.0/b.png", png(2)), ("v1.0/a.cls", b"0\n")]:  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = Shards(shards=str(tmp_path / "a.tar"))
    assert {data.describe(i).rpartition(" ")[2]: (value_of(data[i][0]), data[i][1]) for i in range(2)} == {
        "v1.0/a": (1, 0),
        "v1.0/b": (2, 1),
    }
    other = Shards(shards=str(tmp_path / "a.tar"), image_key="seg.png")
    assert value_of(other[1][0]) == 9


def labelled(folder: Path, *labels: object, **options) -> list[object]:
    """Labels and classes of a data set with these labels: bytes in a cls, others in a json."""
    suffixes = [("cls", x) if isinstance(x, bytes) else ("json", json.dumps({"label": x}).encode()) for x in labels]
    samples = {f"{n}": {"png": png(n), suffix: data} for n, (suffix, data) in enumerate(suffixes)}
    data = Shards(shards=str(write_shard(folder / "a.tar", samples)), **options)
    return [*data.labels.tolist(), data.classes]


def test_labels_are_numbers_or_names_of_cls_or_json(tmp_path):
    assert labelled(tmp_path / "0", b"2", b"0") == [2, 0, ("0", "1", "2")]
    assert labelled(tmp_path / "1", 1, 0, None, -1) == [1, 0, -1, -1, ("0", "1")]
    assert labelled(tmp_path / "2", "dog", "cat", b"dog") == [1, 0, 1, ("cat", "dog")]
    assert labelled(tmp_path / "3", 7, 8, label_key="other") == [-1, -1, ()]
    assert labelled(tmp_path / "mixed", b"b", b"1", b"007") == [2, 1, 0, ("007", "1", "b")]
    assert labelled(tmp_path / "padded", b"002", b"0") == [2, 0, ("0", "1", "2")]
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "classes.txt").write_text("zebra\nant\n\n")
    assert labelled(tmp_path / "4", b"1", "zebra", None) == [1, 0, -1, ("zebra", "ant")]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([1, 2], r"0.json: the label is '\[1, 2\]'"),
        ("a caption " * 20, "0.json: the label is 'a caption"),
        (123456789, "the label 123456789 is no class of 1 samples"),
        (b"\xff", "0.cls: 'utf-8' codec"),
    ],
)
def test_invalid_labels_are_refused(tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        labelled(tmp_path, label)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"not among the 2 classes: \['2'\]"):
        labelled(tmp_path, b"0", b"2")


# --- the held-out part ---


def test_shards_with_a_default_name_are_held_out(tmp_path):
    write_shards(write_shards(tmp_path, (4, 3)), (2,), "val")
    for pattern in ("", "*.tar", "train-{000..001}.tar"):
        data = Shards(shards=str(tmp_path / pattern))
        assert len(data) == 7
        assert len(data.validation() or ()) == 2
    write_shards(tmp_path / "apart" / "train", (4,))
    assert Shards(shards=str(tmp_path / "apart" / "train")).validation() is None
    write_shards(tmp_path / "apart" / "test", (3,))
    assert len(Shards(shards=str(tmp_path / "apart" / "train")).validation() or ()) == 3


def test_configured_held_out_shards_are_never_trained_on(tmp_path):
    write_shards(tmp_path, (4, 3, 2))
    data = Shards(shards=str(tmp_path), val_shards=str(tmp_path / "train-001.tar"))
    held_out = data.validation()
    assert held_out is not None
    assert (len(data), len(held_out)) == (6, 3)
    assert [value_of(held_out[i][0]) for i in range(3)] == [4, 5, 6]
    assert held_out.describe(0).endswith("train-001.tar: 00004")
    assert held_out.validation() is None
    with pytest.raises(ValueError, match="are all the shards"):
        Shards(shards=str(tmp_path), val_shards=str(tmp_path))


def test_held_out_shards_without_labels_are_used_only_if_configured(tmp_path):
    write_shards(tmp_path, (4,))
    write_shard(tmp_path / "test-0.tar", {"0": {"png": png(0)}})
    assert Shards(shards=str(tmp_path)).validation() is None
    assert len(Shards(shards=str(tmp_path), val_shards=str(tmp_path / "test-0.tar")).validation() or ()) == 1


# --- damage ---


@pytest.mark.parametrize("cut", [100, 512, 700, 2048, -10240, -9000])
def test_the_error_for_a_truncated_shard_has_its_name_and_the_byte(tmp_path, cut):
    path = write_shards(tmp_path, (8, 8)) / "train-001.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"train-001.tar: cut off at byte {path.stat().st_size}") as error:
        Shards(shards=str(tmp_path))
    assert "train-000" not in str(error.value)


def test_damaged_headers_and_other_files_are_refused(tmp_path):
    path = write_shards(tmp_path, (8,)) / "train-000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + os.urandom(512) + whole[1536:])
    with pytest.raises(ValueError, match="no header at byte 1024"):
        Shards(shards=str(tmp_path))
    subprocess.run(["gzip", path], check=True)
    path.with_name("train-000.tar.gz").rename(path)
    with pytest.raises(ValueError, match=r"damaged, or no tar \(compressed\?\): no header at byte 0"):
        Shards(shards=str(tmp_path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cut off at byte 0"):
        Shards(shards=str(tmp_path))


@given(st.data())
@settings(max_examples=150, deadline=2000)
def test_no_damage_to_a_header_hangs_or_raises_anything_but_value_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    write_shard(path, {"n" * 120: {"png": b"x" * 700}, "é": {"cls": b"1"}}, tarfile.PAX_FORMAT)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 4095))
        damaged[position] = data.draw(st.sampled_from(b"-0179\x00\x80\xff x="))
    path.write_bytes(damaged)
    with opened(path) as tar, suppress(ValueError):
        members = list(members_of(*tar))
        assert all(0 <= m.offset <= m.offset + m.size <= len(damaged) for m in members)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a": {"txt": b"x", "json": b"{}"}}, r"no images in it \(dataset.image_key\), but json, txt"),
        ({"a": {"mp4": b"x"}}, "videos are read from files: dataset=videofolder"),
        ({}, "but no sample at all"),
        ({"a": {"png": b"x", "json": b"{"}}, "a.json cannot be read \\(Expecting property name"),
        ({"a": {"png": b"x", "json": b"[]"}}, "a.json: 'list' object"),
        ({"./a": {"png": b"x"}, "a": {"png": b"y"}}, "a.png is in it twice"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(tmp_path, samples, message):
    write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(ValueError, match=f"a.tar: .*{message}" if "twice" not in message else message):
        Shards(shards=str(tmp_path))


def test_samples_without_a_readable_image_are_counted_and_replaced(tmp_path):
    samples = numbered(0, 8)
    samples["00002"] = {"cls": b"1"}
    samples["00005"]["png"] = b"no image"
    data = Shards(shards=str(write_shard(tmp_path / "a.tar", samples)))
    with pytest.raises(OSError, match="has no image"):
        data[2]
    batch = next(batches(data, batch_size=8, seed=0, num_workers=0))
    assert sorted(batch.broken.tolist()) == [2, 5]
    assert sorted(batch.pixels[:, 0, 0, 0, 0].tolist()) == [0, 1, 3, 3, 4, 6, 6, 7]


def test_a_shard_that_shrinks_during_a_run_is_an_error(tmp_path):
    path = write_shards(tmp_path, (8,)) / "train-000.tar"
    data = Shards(shards=str(tmp_path))
    os.truncate(path, 540)
    with pytest.raises(OSError, match="bytes are left of it"):
        data[0]


def names_and_bytes(path: Path) -> list[tuple[str, bytes]]:
    with opened(path) as (read, length):
        return [(m.name, read(m.size, m.offset)) for m in members_of(read, length)]


@pytest.mark.parametrize("name", ["a.png", "n" * 150 + ".png"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_is_the_file_that_it_links_to(tmp_path, name, tar_format):
    (tmp_path / name).write_bytes(png(3))
    os.link(tmp_path / name, tmp_path / "b.png")
    with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as tar:
        tar.add(tmp_path / name, name)
        tar.add(tmp_path / "b.png", "b.png")
        assert [member.type for member in tar] == [tarfile.REGTYPE, tarfile.LNKTYPE]
    assert names_and_bytes(tmp_path / "x.tar") == [(name, png(3)), ("b.png", png(3))]
    data = Shards(shards=str(tmp_path / "x.tar"))
    assert [value_of(data[i][0]) for i in (0, 1)] == [3, 3]


def test_a_hard_link_to_nothing_is_refused(tmp_path):
    info = tarfile.TarInfo("b.png")
    info.type, info.linkname = tarfile.LNKTYPE, "gone.png"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"b\.png is a hard link to gone\.png"):
        Shards(shards=str(tmp_path / "x.tar"))


@pytest.mark.parametrize("padding", [10240, 1024, 512])
def test_joined_tars_are_read_to_the_end(tmp_path, padding):
    one, two = write_shard(tmp_path / "1.tar", numbered(0, 3)), write_shard(tmp_path / "2.tar", numbered(3, 4))
    first = one.read_bytes().rstrip(b"\0")
    first += bytes(-len(first) % 512 + padding)  # writers differ in how many blocks of zeros end a tar
    joined = tmp_path / "joined" / "all.tar"
    joined.parent.mkdir()
    joined.write_bytes(first + two.read_bytes())
    data = Shards(shards=str(joined))
    assert [value_of(data[i][0]) for i in range(len(data))] == list(range(7))
    joined.write_bytes(joined.read_bytes() + b"notes after the end")
    assert len(Shards(shards=str(joined))) == 7


def test_held_out_shards_with_classes_in_another_order_are_matched_by_name(tmp_path):
    for part, classes in (("train", "ant\nbee\ncow\n"), ("val", "cow\nbee\nant\n")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "classes.txt").write_text(classes)
        samples = {f"{n}": {"png": png(n), "cls": str(n).encode()} for n in range(3)}
        write_shard(tmp_path / part / f"{part}-0.tar", samples)
    data = Shards(shards=str(tmp_path / "train"))
    held_out = data.validation()
    assert held_out is not None
    assert data.labels.tolist() == [0, 1, 2]
    assert held_out.labels.tolist() == [2, 1, 0]


def test_classes_that_only_held_out_shards_have_are_left_out_and_named(tmp_path, caplog):
    write_shard(tmp_path / "train-0.tar", {f"{n}": {"png": png(n), "cls": c} for n, c in enumerate([b"ant", b"bee"])})
    write_shard(tmp_path / "val-0.tar", {f"{n}": {"png": png(n), "cls": c} for n, c in enumerate([b"Bee", b"cow"])})
    held_out = Shards(shards=str(tmp_path)).validation()
    assert held_out is not None
    assert held_out.labels.tolist() == [1, -1]
    assert "['cow']" in caplog.text


def test_samples_of_unknown_classes_are_counted_and_not_their_labels(tmp_path, caplog):
    write_shard(tmp_path / "train-0.tar", {f"{n}": {"png": png(n), "cls": c} for n, c in enumerate([b"ant", b"bee"])})
    labels = [b"cow", b"ant", b"cow", b"cow"]
    write_shard(tmp_path / "val-0.tar", {f"{n}": {"png": png(n), "cls": c} for n, c in enumerate(labels)})
    assert Shards(shards=str(tmp_path)).validation() is not None
    assert "['cow']; 3 samples have no label" in caplog.text


def test_held_out_shards_without_labels_are_passed_over_with_the_reason(tmp_path, caplog):
    write_shards(tmp_path, (4,))
    write_shard(tmp_path / "test-0.tar", {"0": {"png": png(0)}})
    assert Shards(shards=str(tmp_path)).validation() is None
    assert "test-0.tar is not used as the held-out part: none of its 1 samples has a label" in caplog.text


@pytest.mark.parametrize("labels", [[10**7, 3, 4], list(range(150)), [f"img{n}" for n in range(150)], [0, -3, 1]])
def test_ids_are_not_taken_for_classes(tmp_path, labels):
    samples = {f"{n}": {"png": png(n % 250), "cls": str(label).encode()} for n, label in enumerate(labels)}
    with pytest.raises(ValueError, match=r"dataset\.shards: the .*label.*; see label_key"):
        Shards(shards=str(write_shard(tmp_path / "a.tar", samples)))


# --- the index file ---


def indices_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".index-*.npy"))


def test_headers_are_read_once_and_again_if_a_shard_changes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_shards(tmp_path, (3, 3))
    first = Shards(shards=str(tmp_path))
    second = Shards(shards=str(tmp_path))
    assert caplog.text.count("reading the headers") == 1
    assert np.array_equal(first.index, second.index)
    write_shard(tmp_path / "train-000.tar", numbered(0, 5))
    assert len(Shards(shards=str(tmp_path))) == 8
    assert caplog.text.count("reading the headers") == 2


def test_a_damaged_index_is_rebuilt(tmp_path):
    write_shards(tmp_path, (3, 3))
    expected = Shards(shards=str(tmp_path)).index.tolist()
    path = tmp_path / indices_in(tmp_path)[0]
    for damage in (b"", b"nonsense", path.read_bytes()[:-20]):
        path.unlink()
        path.write_bytes(damage)
        assert Shards(shards=str(tmp_path)).index.tolist() == expected


def test_the_cache_holds_the_index_if_the_folder_of_the_shards_cannot_be_written(tmp_path, monkeypatch, caplog):
    write_shards(tmp_path / "shards", (3, 3))
    (tmp_path / "shards" / ".index.lock").mkdir()  # also root can't write a folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(Shards(shards=str(tmp_path / "shards"))) == 6
    assert len(indices_in(tmp_path / "cache" / "jepa-train")) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(Shards(shards=str(tmp_path / "shards"))) == 6
    assert "can be written" in caplog.text


def test_concurrent_readers_read_the_headers_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_shards(tmp_path, (20, 20, 20))
    with ThreadPoolExecutor(6) as pool:
        indices = list(pool.map(lambda _: Shards(shards=str(tmp_path)).index.tolist(), range(6)))
    assert all(rows == indices[0] for rows in indices)
    assert caplog.text.count("reading the headers") == 1
    assert not list(tmp_path.glob("*.part"))


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jepa.data.shard_files.MAX_OPEN_FILES", 2)
    write_shards(tmp_path, (1,) * 6)
    data = Shards(shards=str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert [value_of(data[i][0]) for i in (0, 1, 2, 3, 4, 5, 0, 5)] == [0, 1, 2, 3, 4, 5, 0, 5]
    assert len(data.files._open) == 2
    copied = pickle.loads(pickle.dumps(data))
    assert value_of(copied[3][0]) == 3
    del data, copied
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= before


# --- the order ---

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)


@given(COUNTS, st.integers(1, 10), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_that_reads_few_shards_at_a_time(counts, width, seed):
    total = sum(counts)
    at = window_shuffle(np.array(counts), width, seed)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    for epoch in range(3):
        samples = [at(epoch * total + offset) for offset in range(total)]
        assert sorted(index for index, _ in samples) == list(range(total))
        assert {e for _, e in samples} == {epoch}
        order = list(dict.fromkeys(shard_of[[index for index, _ in samples]].tolist()))
        spans = [[i for i, (index, _) in enumerate(samples) if shard_of[index] == shard] for shard in order]
        open_at_once = [sum(span[0] <= i <= span[-1] for span in spans) for i in range(total)]
        assert max(open_at_once) <= width


@given(COUNTS, st.integers(1, 10), st.lists(st.integers(0, 200), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_position_is_computed_without_those_before_it(counts, width, positions):
    counts = np.array(counts)
    in_order = window_shuffle(counts, width, seed=1)
    whole = [in_order(position) for position in range(201)]
    direct = window_shuffle(counts, width, seed=1)
    assert [direct(position) for position in positions] == [whole[position] for position in positions]
    assert [window_shuffle(counts, width, seed=1)(p) for p in positions[:3]] == [whole[p] for p in positions[:3]]


def test_epochs_and_seeds_have_different_orders_and_windows():
    counts = np.full(8, 10)
    orders = {
        tuple(window_shuffle(counts, 2, seed)(e * 80 + p)[0] for p in range(80)) for seed in (0, 1) for e in (0, 1)
    }
    windows = {frozenset(index // 10 for index in order[:20]) for order in orders}
    assert len(orders) == 4
    assert all(len(window) == 2 for window in windows)
    assert len(windows) > 1


def test_within_a_window_all_samples_are_mixed():
    at = window_shuffle(np.full(4, 500), 2, seed=0)
    indices = np.array([at(p)[0] for p in range(1000)])
    shards = indices // 500
    halves = [np.mean(part == shards[0]) for part in (shards[:500], shards[500:])]
    assert all(abs(half - 0.5) < 0.07 for half in halves)  # three standard deviations of 500 draws
    assert abs(np.corrcoef(indices % 500, np.arange(1000))[0, 1]) < 0.1


@pytest.fixture
def uneven(tmp_path) -> Shards:
    return Shards(shards=str(write_shards(tmp_path, (5, 1, 9, 4, 12))), shuffle_shards=2)


@pytest.mark.parametrize("first_step", [0, 1, 7, 8, 31])
def test_a_run_resumed_at_a_step_reads_the_same_batches(uneven, first_step):
    assert batch_values(uneven, 3, first_step=first_step) == batch_values(uneven, first_step + 3)[first_step:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_each_step_of_the_same_order(uneven, world_size):
    alone = batch_values(uneven, 12)
    share = partial(batch_values, uneven, 12, batch_size=4 // world_size, world_size=world_size)
    ranks = [share(rank=rank) for rank in range(world_size)]
    assert [[x for row in zip(*parts, strict=True) for x in row] for parts in zip(*ranks, strict=True)] == alone
    assert sorted(x for batch in batch_values(uneven, 31) for x in batch) == sorted(4 * list(range(31)))


def test_workers_do_not_change_the_batches(uneven):
    assert batch_values(uneven, 12, num_workers=2, first_step=3) == batch_values(uneven, 12, first_step=3)


def test_samples_of_a_shard_stay_together_in_a_mixture(tmp_path):
    write_shards(tmp_path / "a", (10,) * 6)
    write_shards(tmp_path / "b", (10,) * 3)
    parts = {name: partial(Shards, shards=str(tmp_path / name), shuffle_shards=1) for name in "ab"}
    mixed = Mixture(num_frames=1, parts=parts, weights={"a": 2, "b": 1}, probe="b")
    at = mixed.index_order(4, seed=0)
    part = [index for index in (at(p)[0] for p in range(150)) if index < 60][:60]
    assert sorted(part) == list(range(60))
    assert all(len({index // 10 for index in part[k : k + 10]}) == 1 for k in range(0, 60, 10))
    assert mixed.describe(61) == f"{tmp_path}/b/train-000.tar: 00001"


@pytest.mark.slow
def test_a_run_trains_on_shards_and_is_probed_on_the_held_out_ones(tmp_path, tiny):
    write_shards(write_shards(tmp_path / "shards", (12, 7, 20)), (16,), "val")
    pattern = f'dataset.shards="{tmp_path}/shards/train-{{000..002}}.tar"'
    arguments = ["dataset=webdataset", pattern, "dataset.shuffle_shards=2", "logger=none", "precision=fp32"]
    JEPAAgent(JEPAConfig(*tiny, *arguments), folder=tmp_path / "run").train()
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["step"] == 2
    assert "probe/knn_top1" in rows[-1]


@pytest.mark.parametrize("width", [0, -1])
def test_a_window_of_no_shards_is_refused(tmp_path, width):
    with pytest.raises(ValueError, match=f"shuffle_shards={width}: must be at least 1"):
        checked(Shards, shards=str(tmp_path), shuffle_shards=width)
