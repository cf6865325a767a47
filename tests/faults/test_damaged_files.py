"""Whatever a file holds, it is read or refused by its name: no traceback, no code, no memory without bound."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coco_folder import CATEGORIES, GOOD_BOX, IMAGES, coco, write_coco
from hostile_files import DEEP, VALUES, bounded_memory, changed, damaged, refused_or_read
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from voc_folder import voc, write_voc, xml

from jepa.benchmark import report as benchmark_report
from jepa.benchmark.results import RESULTS_FILE, Results, Row
from jepa.cli.compare import main as compare_command
from jepa.config.files import read_json, read_yaml
from jepa.config.paths import find_source, shape_of
from jepa.data.decode import read_header
from jepa.data.folders import read_table
from jepa.data.shard_index import read_index
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError, FileError
from jepa.exporters.card import read_provenance as read_card
from jepa.parallel.session import open_session
from jepa.reports.run import write_report
from jepa.runs import checkpoint
from jepa.runs.folder import open_folder
from jepa.runs.metrics import read_rows, rewind

FILES = Path(__file__).parents[1] / "files"
FEW = settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
CODE = "!!python/object/apply:pathlib.Path.touch [ran]"


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with bounded_memory():
        yield
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def run(tmp_path) -> Path:
    folder = shutil.copytree(FILES / "earlier_run", tmp_path / "outputs" / "earlier")
    (folder / "checkpoints" / "last").symlink_to("step_00000002")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"status": "finished"}))
    return folder


@pytest.fixture
def export(tmp_path) -> Path:
    return shutil.copytree(FILES / "earlier_export", tmp_path / "export")


def stored(path: Path) -> Any:
    return json.loads(path.read_text())


EXPORT, STATE = FILES / "earlier_export", FILES / "earlier_run/checkpoints/step_00000002/state.json"
TEXTS = st.sampled_from(['{"a": 1', "\x00", "null", "[]", '{"a": NaN}', "\ufeff{}", CODE])


def documents(content: Any) -> st.SearchStrategy[bytes]:
    """JSON that is not what was written: other values, other bytes, and depth."""
    as_json = changed(content).map(lambda value: json.dumps(value).encode())
    return as_json | damaged(json.dumps(content).encode()) | (DEEP | TEXTS).map(str.encode)


def yaml_documents(content: Any) -> st.SearchStrategy[bytes]:
    tags = st.sampled_from([
        CODE, f"encoder: {CODE}", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: 2020-99-99", "a: !!set {b}",
        "a: &a [*a]", "a: &a [1]\nb: [*a, *a]", "? [1]\n: 2", "a: " + "9" * 5000, "<<: 3", "- " * 5000, "? " * 5000,
        "{a: " * 5000, "seed: 2020-01-01", "encoder: 3", "- a", "3", "",
    ])  # fmt: skip
    dumped = changed(content).map(lambda value: yaml.safe_dump(value).encode())
    return dumped | damaged(yaml.safe_dump(content).encode()) | (DEEP | tags).map(str.encode)


@FEW
@given(data=documents(stored(STATE)))
@example(data=json.dumps(stored(STATE) | {"encoder": {"_target_": "jepa.encoders.pretrained.torch.hub.load"}}).encode())
def test_state_json(data, run) -> None:
    folder = run / "checkpoints" / "step_00000002"
    (folder / "state.json").write_bytes(data)
    refused_or_read(lambda: open_encoder(run), "step_00000002")
    refused_or_read(lambda: checkpoint.read_state(folder), "step_00000002")
    refused_or_read(lambda: shape_of(find_source(str(run))), "state.json")
    refused_or_read(lambda: read_card(str(run)), "step_00000002")
    refused_or_read(lambda: claim(run), "step_00000002", also=(ConfigError,))


def claim(run: Path) -> None:
    config = yaml.safe_load((FILES / "earlier_run" / "config.yaml").read_text())
    with open_folder(run, config=config, resume=True, session=open_session(device="cpu", precision="fp32")):
        pass


def test_a_damaged_format_of_a_state_is_damage_and_not_another_version(run) -> None:
    folder = run / "checkpoints" / "step_00000002"
    state = checkpoint.with_checksum(stored(STATE))
    (folder / "state.json").write_text(json.dumps(state | {"format": "jepa-train checkpoint 3"}))
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged: state\.json has changed"):
        checkpoint.read_state(folder)


def test_a_state_without_its_best_checkpoint_is_read(run) -> None:
    folder = run / "checkpoints" / "step_00000002"
    state = {key: value for key, value in stored(STATE).items() if key not in ("best", "checksum")}
    (folder / "state.json").write_text(json.dumps(checkpoint.with_checksum(state)))
    assert "best" not in checkpoint.read_state(folder)


@FEW
@given(data=documents(stored(FILES / "earlier_run" / "run.json")))
def test_run_json(data, run) -> None:
    (run / "run.json").write_bytes(data)
    refused_or_read(lambda: claim(run), "run.json", also=(ConfigError,))
    refused_or_read(lambda: write_report(run), "run.json")
    assert compare_command([str(run)]) in (0, 2)


@FEW
@given(data=yaml_documents(yaml.safe_load((FILES / "earlier_run" / "config.yaml").read_text())))
def test_config_yaml(data, run) -> None:
    (run / "config.yaml").write_bytes(data)
    write_report(run)
    assert compare_command([str(run)]) in (0, 2)
    folder = run / "checkpoints" / "step_00000002"
    (folder / "config.yaml").write_bytes(data)
    state = stored(STATE)
    del state["encoder"]  # as before checkpoints named their encoder
    state["digests"]["config.yaml"] = hashlib.sha256(data).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    refused_or_read(lambda: open_encoder(run), "step_00000002")
    refused_or_read(lambda: read_card(str(run)), "config.yaml")


ROWS = [json.loads(line) for line in (FILES / "earlier_run" / "metrics.jsonl").read_text().splitlines()]


@FEW
@given(lines=st.lists(documents(ROWS[-1]), min_size=1, max_size=3))
def test_metrics_jsonl(lines, run) -> None:
    good = json.dumps(ROWS[0]).encode()
    (run / "metrics.jsonl").write_bytes(b"\n".join([good, *lines, good, b""]))
    refused = refused_or_read(lambda: read_rows(run), "metrics.jsonl, line")
    assert bool(refused) == bool(refused_or_read(lambda: write_report(run), "metrics.jsonl, line"))
    assert compare_command([str(run)]) in (0, 2)
    refused_or_read(lambda: rewind(run, 3), "metrics.jsonl, line")


@FEW
@given(data=documents(stored(FILES / "earlier_run" / "provenance.json")))
def test_provenance_json(data, run) -> None:
    (run / "provenance.json").write_bytes(data)
    refused_or_read(lambda: write_report(run), "provenance.json")


@FEW
@given(data=documents(stored(EXPORT / "config.json")))
def test_config_json_of_an_export(data, export) -> None:
    (export / "config.json").write_bytes(data)
    refused_or_read(lambda: open_encoder(export), "export")
    refused_or_read(lambda: shape_of(find_source(str(export))), "export", also=(ValueError,))


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors(path: Path) -> st.SearchStrategy[bytes]:
    header, body = header_of(path)
    texts = changed(header).map(lambda value: json.dumps(value).encode()) | DEEP.map(str.encode)
    lengths = st.none() | st.sampled_from([0, 1, 2**31, 2**62, 2**64 - 1])
    whole = st.tuples(texts, lengths).map(
        lambda at: struct.pack("<Q", len(at[0]) if at[1] is None else at[1]) + at[0] + body
    )
    return whole | damaged(path.read_bytes())


@FEW
@given(data=safetensors(EXPORT / "model.safetensors"))
def test_headers_of_an_export(data, export) -> None:
    (export / "model.safetensors").write_bytes(data)
    refused_or_read(lambda: open_encoder(export), "export")


SHARD = next((FILES / "earlier_run/checkpoints/step_00000002").glob("*.safetensors"))


def with_sharding(claim: Any) -> bytes:
    from safetensors.torch import load, save

    return save(load(SHARD.read_bytes()), {"DCP_SHARDING_INFO": json.dumps(claim), "DCP_VERSION": "1.0"})


@FEW
@given(data=safetensors(SHARD) | changed({name: {} for name in list(header_of(SHARD)[0])[:4]}).map(with_sharding))
def test_headers_of_a_checkpoint(data, run) -> None:
    folder = run / "checkpoints" / "step_00000002"
    (folder / SHARD.name).write_bytes(data)
    state = stored(STATE)
    state["digests"][SHARD.name] = hashlib.sha256(data).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    refused_or_read(lambda: open_encoder(run), "step_00000002")


TRANSFORMERS = {
    "model_type": "ijepa", "hidden_act": "gelu", "num_attention_heads": 2, "image_size": [16, 16], "patch_size": 4,
    "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
PREPROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
INDEX = {"weight_map": {"embeddings.position_embeddings": "model.safetensors"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", TRANSFORMERS), ("preprocessor_config.json", PREPROCESSOR),
        ("model.safetensors.index.json", INDEX),
    ],
)  # fmt: skip
def test_folders_of_transformers(name, content, tmp_path) -> None:
    from jepa.encoders.names import IJEPA, TABLE, to_foreign
    from jepa.encoders.spatial import SpatialEncoder

    encoder = SpatialEncoder(clip_shape=(3, 1, 16, 16), patch_size=4, embed_dim=8, depth=1, num_heads=2)
    tensors = to_foreign(encoder.state_dict() | {TABLE: encoder.positions.table}, IJEPA, (3, 4, 4))
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(TRANSFORMERS))
    assert open_encoder(tmp_path / "theirs").embed_dim == 8

    @FEW
    @given(data=documents(content))
    def check(data: bytes) -> None:
        (tmp_path / "theirs" / name).write_bytes(data)
        refused_or_read(lambda: open_encoder(tmp_path / "theirs"), "theirs")

    check()


def test_pickles(tmp_path) -> None:
    torch.save({"encoder": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}}, tmp_path / "w.pth")

    @FEW
    @given(data=damaged((tmp_path / "w.pth").read_bytes()))
    def check(data: bytes) -> None:
        (tmp_path / "w.pth").write_bytes(data)
        assert refused_or_read(lambda: open_encoder(tmp_path / "w.pth"), "w.pth")

    check()


FACTS = {"test": "t", "classes": ["a", "b"], "warnings": [], "config": {}, "versions": {}, "device": "cpu"}
FACTS |= {"num_train": 4, "num_test": 4, "precision": "fp32"}


def results_json(tmp_path: Path) -> dict:
    row = Row(
        title="x", column="kNN", key="k", top1=50.0, low=1.0, high=2.0, deviation=None, balanced=None, num_test=4,
        per_class=[1.0, None], confusion=[[1, 0], [0, 1]], settings={}, protocol=["p"], seconds={"probe": 1.0}, run="r",
        trials=[{"seed": 0, "top1": 50.0, "balanced": None, "chosen": {"k": 3}}],
    )  # fmt: skip
    results = Results.open(tmp_path / "eval", FACTS)
    results.add(row)
    return stored(tmp_path / "eval" / RESULTS_FILE)


def test_eval_json(tmp_path) -> None:
    @FEW
    @given(data=documents(results_json(tmp_path)))
    def check(data: bytes) -> None:
        (tmp_path / "eval" / RESULTS_FILE).write_bytes(data)

        def read() -> None:
            results = Results.open(tmp_path / "eval", FACTS)
            if results.rows:
                benchmark_report.write(results)

        refused_or_read(read, "eval")

    check()


def tar_bytes() -> bytes:
    picture, file = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "a.png": picture.getvalue(),
            "a.cls": b"1",
            "b.json": b'{"label": 2}',
            "é" * 120: b"",
        }.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


@FEW
@given(data=damaged(tar_bytes()), number=st.integers())
def test_tars(data, number, tmp_path) -> None:
    shard = tmp_path / f"{number}.tar"
    shard.write_bytes(data)
    for _ in range(2):  # from the headers, then from the index that is kept
        refused_or_read(lambda: read_index([shard], None, "label"), shard.name, also=(ValueError,))
    for kept in tmp_path.glob(".index-*"):
        kept.write_bytes(data)
    refused_or_read(lambda: read_index([shard], None, "label"), shard.name, also=(ValueError,))


@pytest.mark.parametrize("size", [b"-0000000001\0", b"7777777777\0\0", b"\x80" + b"\xff" * 11, b"zzzzzzzzzzz\0"])
def test_sizes_in_the_header_of_a_tar(size, tmp_path) -> None:
    data = bytearray(tar_bytes())
    data[124:136] = size
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: (damaged at byte|cut off at byte)"):
        read_index([tmp_path / "a.tar"], None, "label")


def parquet_bytes() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "label": ["x", "y"]}), file)
    return file.getvalue()


@FEW
@given(data=damaged(parquet_bytes()))
def test_parquet(data, tmp_path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    refused_or_read(lambda: read_table(path, "dataset.annotations", ["path", "label"]), "t.parquet", (ValueError,))


def test_parquet_with_more_rows_than_bytes(tmp_path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = pa.nulls(10_000_000, pa.string())
    parquet.write_table(pa.table({"path": rows, "label": rows}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"t\.parquet: .* states 10,000,000 rows, more than the file has bytes"):
        read_table(tmp_path / "t.parquet", "dataset.annotations", ["path", "label"])


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file_or_too_large_is_not_read(read: Callable, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("folder", "large", "/dev/zero", "missing"):
        with pytest.raises(FileError, match=name):
            read(tmp_path / name)


@FEW
@given(value=VALUES)
def test_what_is_written_as_json_or_yaml_is_read_alike(value, tmp_path) -> None:
    """Two routes: one check, whatever the format."""
    (tmp_path / "a.json").write_text(json.dumps({"a": value}))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"a": value}))
    by_json = refused_or_read(lambda: read_json(tmp_path / "a.json"), "a.json")
    by_yaml = refused_or_read(lambda: read_yaml(tmp_path / "a.yaml"), "a.yaml")
    assert bool(by_json) == bool(by_yaml) or "null byte" in by_yaml or "special characters" in by_yaml


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_parquet_of_images(damage, tmp_path) -> None:
    from jepa.data.huggingface import HuggingFaceImages

    path = tmp_path / "train.parquet"
    path.write_bytes(parquet_bytes()[:-20] if damage == "cut" else b"hello")
    with pytest.raises(ValueError, match=r"train\.parquet: is not readable as parquet"):
        HuggingFaceImages(path=str(path))


def check_boxes(dataset: Any) -> None:
    """Whatever a file says, boxes are finite, lie in their image and have a class."""
    for clip, _, fields in map(dataset.__getitem__, range(len(dataset))):
        left, top, right, bottom, numbers = fields["boxes"].unbind(dim=1)
        assert ((left >= 0) & (left <= right) & (right <= clip.shape[-1])).all()
        assert ((top >= 0) & (top <= bottom) & (bottom <= clip.shape[-2])).all()
        assert set(numbers.tolist()) <= set(range(len(dataset.classes)))


@FEW
@given(data=documents({"images": IMAGES, "annotations": [GOOD_BOX | {"iscrowd": 0}] * 2, "categories": CATEGORIES}))
def test_annotations_of_coco(data, tmp_path) -> None:
    write_coco(tmp_path, [])
    (tmp_path / "all.json").write_bytes(data)
    refused_or_read(lambda: check_boxes(coco(tmp_path)), "all.json", also=(ValueError,))


GOOD_XML = xml(("ant", 1, 2, 3, 4), ("bee", 5, 6, 25, 30), extra="<difficult>0</difficult>")
PLACES = (">1<", ">ant<", ">60<", ">40<", ">0<", "<bndbox>", "</object>", "<size>", "name", "<annotation>")
BOMB = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 14))
HOSTILE_XML = st.sampled_from([
    f'<!DOCTYPE a [<!ENTITY a0 "{"x" * 99}">{BOMB}]><annotation>&a13;</annotation>',
    f'<!DOCTYPE a [<!ENTITY a "{"x" * 9**6}">]><annotation>{"&a;" * 9**5}</annotation>',
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + GOOD_XML.replace("ant", "&b;"),
    '<!DOCTYPE a SYSTEM "http://localhost:1/a.dtd">' + GOOD_XML, '<!DOCTYPE a [<!ENTITY % b "c"> %b;]>' + GOOD_XML,
    "<object>" * 10**5 + "</object>" * 10**5, "<a>" * 10**6, f"<annotation {'a=' * 9}/>",
    "<annotation>&b;</annotation>",
    '<?xml version="1.0" encoding="utf-7"?>' + GOOD_XML, '<?xml version="1.0" encoding="idna"?>' + GOOD_XML,
    '<annotation xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="/etc/passwd"/></annotation>',
])  # fmt: skip
XML_FILES = (
    st.tuples(st.sampled_from(PLACES), st.text(max_size=6) | st.sampled_from(["9" * 400, "nan", "-inf", "1e999"]))
    .map(lambda drawn: GOOD_XML.replace(drawn[0], f"{drawn[0][:1]}{drawn[1]}{drawn[0][-1:]}").encode(errors="replace"))
    | damaged(GOOD_XML.encode()) | HOSTILE_XML.map(str.encode)
    | HOSTILE_XML.map(lambda text: text[:9**6].encode("utf-16"))
)  # fmt: skip


@FEW
@given(data=XML_FILES)
def test_annotations_of_voc(data, tmp_path) -> None:
    write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    (tmp_path / "Annotations" / "a.xml").write_bytes(data)

    def read() -> None:
        dataset = voc(tmp_path, val_split=None)
        assert not any("root:" in name for name in dataset.classes)
        check_boxes(dataset)

    refused_or_read(read, str(tmp_path), also=(ValueError,))


def test_annotations_that_are_no_files_or_too_large_are_not_read(tmp_path) -> None:
    write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    write_coco(tmp_path, [])
    for name in ("all.json", "Annotations/a.xml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(FileError, match=r"all\.json"):
        coco(tmp_path)
    with pytest.raises(FileError, match=r"a\.xml"):
        voc(tmp_path, val_split=None)


def turned_images() -> st.SearchStrategy[bytes]:
    exif = Image.Exif()
    exif[274] = 6
    files = []
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (6, 4)).save(file, kind, exif=exif)
        files.append(file.getvalue())
    return st.sampled_from(files).flatmap(damaged)


@settings(FEW, max_examples=300)
@given(data=turned_images())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_headers_of_images(data, tmp_path) -> None:
    (tmp_path / "a").write_bytes(data)
    try:
        header = read_header(tmp_path / "a")
    except OSError:
        return
    assert header.orientation in range(1, 9)
    assert min(header.size) >= 0
