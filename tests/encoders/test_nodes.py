"""What a file says of an encoder is data: a class of ours, plain values, sizes of the tensors beside it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hostile_files import bounded_memory
from safetensors.torch import load_file, save_file

from jepa import JEPAAgent, load_encoder
from jepa.cli import eval as eval_command
from jepa.cli import export as export_command
from jepa.config import compose
from jepa.encoders.nodes import encoder_class
from jepa.encoders.pretrained import TimmEncoder, pretrained_encoder
from jepa.runs.checkpoint import CheckpointError, load_model

FILES = Path(__file__).parents[1] / "files"
TINY = ["steps=2", "save_every=1", "keep=9", "batch_size=4", "image_size=16", "evaluator=[]", "logger=none"]
TINY += ["dataset.num_samples=16", "dataset.side=16", "encoder.patch_size=8", "encoder.embed_dim=8", "encoder.depth=1"]
TINY += ["encoder.num_heads=2", "predictor.width=8", "predictor.depth=1", "num_workers=0", "device=cpu", "mask=random"]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test here may take memory by the gigabyte, whatever a file asks for."""
    with bounded_memory():
        yield


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder whose hubconf.py leaves a trace when it is run."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text("import pathlib\npathlib.Path('ran').touch()\ndef evil(**_): raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    return folder


def stored(tmp_path: Path, kind: str, node: object) -> Path:
    """A run, a checkpoint of before they named their encoder, or an export, with this node in it."""
    source = {"export": "earlier_export", "run": "earlier_run", "earlier": "earlier_run"}[kind]
    folder = shutil.copytree(FILES / source, tmp_path / kind)
    if kind == "export":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"encoder": node}))
        return folder
    checkpoint = folder / "checkpoints" / "step_00000002"
    state = json.loads((checkpoint / "state.json").read_text()) | {"encoder": node}
    if kind == "earlier":
        (checkpoint / "config.yaml").write_text(json.dumps({"encoder": state.pop("encoder")}))
        del state["digests"]["config.yaml"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    return checkpoint


def node() -> dict:
    return json.loads((FILES / "earlier_export" / "config.json").read_text())["encoder"]


@pytest.mark.parametrize("kind", ["run", "earlier", "export"])
def test_the_code_of_a_folder_that_a_file_names_is_not_run(kind, hub, tmp_path) -> None:
    call = {"_target_": "jepa.encoders.pretrained.torch.hub.load", "repo_or_dir": str(hub), "model": "evil"}
    source = stored(tmp_path, kind, call | {"source": "local", "clip_shape": [3, 1, 16, 16]})
    for read in (load_encoder, lambda path: pretrained_encoder(clip_shape=(3, 1, 16, 16), weights=str(path))):
        with pytest.raises(CheckpointError, match=r"torch\.hub\.load is not one of jepa\.encoders"):
            read(source)
    assert eval_command.main([f"run={source}", "num_workers=0", "device=cpu"]) == 1
    assert export_command.main([f"run={source}", "output=out"]) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "jepa.encoders.published.pickle.loads", "jepa.encoders.spatial.nn.Linear", "jepa.encoders"),
        *("jepa.encoders.published.write_encoder", "jepa.encoders.published.download", "jepa.encoders.nodes.build"),
        *("jepa.encoders.published.Weights", "jepa.encoders.pretrained.pretrained_encoder", "jepa.agent.JEPAAgent"),
        *("jepa.encoders.spatial.SpatialEncoder.__init__", "jepa.encoders.nodes.Eva", "jepa.encoders.nodes.ShapesOnly"),
        *("jepa.encoders.spatial", "jepa.encoders..spatial.SpatialEncoder", "jepa.encoders.antigravity.x", "", None, 3),
        *(
            ["jepa.encoders.spatial.SpatialEncoder"],
            {"_target_": "os.system"},
            "jepa.encoders.spatial.SpatialEncoder ",
        ),
    ],
)
def test_only_encoder_classes_of_this_package_are_built(target, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"is not one of jepa\.encoders") as refusal:
        load_encoder(stored(tmp_path, "export", node() | {"_target_": target}))
    assert str(tmp_path / "export") in str(refusal.value)


def test_every_encoder_of_the_configuration_may_be_named_by_a_file() -> None:
    names = ("spatial.SpatialEncoder", "temporal.TemporalEncoder", "pretrained.TimmEncoder")
    assert all(encoder_class(f"jepa.encoders.{name}") for name in names)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"depth": "1"}, "depth takes a whole number, not the text '1'"),
        ({"depth": True}, "depth takes a whole number"),
        ({"depth": -1}, "depth must not be negative"),
        ({"depth": None}, "depth takes a whole number, not null"),
        ({"patch_size": [4, {"_target_": "os.getcwd"}]}, "patch_size takes"),
        ({"patch_size": [4, 4, 4]}, "too many values"),
        ({"position": "${oc.env:HOME}"}, "no such position"),
        ({"clip_shape": [3, 1, 16]}, "clip_shape takes"),
        ({"clip_shape": [3, 1, -16, 16]}, "clip_shape"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be above 0"),
        ({"num_heads": 3}, "not divisible by"),
        ({"_args_": [1]}, "SpatialEncoder takes no _args_"),
        ({"_partial_": True}, "SpatialEncoder takes no _partial_"),
        ({"device": "meta"}, "SpatialEncoder takes no device"),
        ({"depth": 10**30}, "more than 64 bits"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "export"])
def test_values_of_the_wrong_type_are_refused_by_key(kind, change, reason, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=reason) as refusal:
        load_encoder(stored(tmp_path, kind, node() | change))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_argument_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="lacks embed_dim, depth"):
        load_encoder(stored(tmp_path, "export", {k: v for k, v in node().items() if k not in ("embed_dim", "depth")}))


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9}, {"embed_dim": 1 << 20}, {"embed_dim": 1 << 40}, {"patch_size": 1 << 20}, {"mlp_ratio": 1e12},
        {"clip_shape": [3, 1 << 20, 16, 16]}, {"clip_shape": [1 << 30, 1, 16, 16]},
        {"clip_shape": [3, 1, 1 << 24, 1 << 24]}, {"position": "table", "clip_shape": [3, 1, 1 << 20, 1 << 20]},
        {"patch_size": 1, "clip_shape": [48, 1, 1 << 16, 1 << 16]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("fresh", [False, True])
def test_sizes_beyond_the_tensors_of_the_file_are_refused_before_they_are_built(change, fresh, tmp_path) -> None:
    from jepa.encoders.pretrained import open_encoder

    source = stored(tmp_path, "export", node() | change)
    if change.get("clip_shape", [3])[0] == 3 and change.get("clip_shape", [3, 1])[1] > 1:
        assert open_encoder(source, fresh=fresh).clip_shape[1] == 1 << 20  # frames apart need no memory
        return
    with pytest.raises(CheckpointError, match=r"does not fit|lacks|bytes of positions|another architecture|export: "):
        open_encoder(source, fresh=fresh)


def timm_export(tmp_path: Path, **changes) -> Path:
    from jepa.encoders.pretrained import open_encoder
    from jepa.encoders.published import write_encoder

    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    encoder = TimmEncoder(clip_shape=(3, 1, 32, 32), architecture="vit_tiny_patch16_224", arguments=sizes)
    encoder.transform = open_encoder("timm:vit_tiny_patch16_224", fresh=True).transform
    write_encoder(tmp_path / "out", encoder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["encoder"] |= {**changes, "arguments": config["encoder"]["arguments"] | changes.get("arguments", {})}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    return tmp_path / "out"


def test_an_unchanged_export_of_a_timm_encoder_is_read(tmp_path) -> None:
    assert load_encoder(timm_export(tmp_path)).embed_dim == 24


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "local-dir:/tmp"}, "has no model 'local-dir:/tmp'"),
        ({"architecture": "hf-hub:a/b"}, "has no model 'hf-hub:a/b'"),
        ({"folder": "/tmp"}, "names a folder of weights"),
        ({"arguments": {"checkpoint_path": "/tmp/x.pth"}}, "checkpoint_path is no argument"),
        ({"arguments": {"pretrained_cfg": {"file": "/tmp/x"}}}, "pretrained_cfg is no argument"),
        ({"arguments": {"norm_layer": {"_target_": "os.system"}}}, "norm_layer is no argument"),
        ({"arguments": {"depth": 10**9}}, "lacks blocks"),
        ({"arguments": {"embed_dim": 1 << 30}}, "out: "),
        ({"arguments": {"reg_tokens": 1 << 40}}, "out lacks trunk.reg_token"),
        ({"architecture": "resnet18"}, "out: "),
    ],
)
def test_a_file_tells_timm_a_name_of_its_list_and_plain_sizes(change, reason, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_encoder(timm_export(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": 3}, "architecture takes text"),
        ({"architecture": "hf-hub:a/b"}, "has no model"),
        ({"model_args": [1]}, "model_args takes"),
        ({"model_args": {"checkpoint_path": "x"}}, "checkpoint_path is no argument"),
        ({"pretrained_cfg": {"input_size": [3, "a", 4]}}, "input_size takes"),
        ({"pretrained_cfg": {"mean": 3}}, "mean takes"),
        ({"model_args": {"depth": 10**9}}, "more blocks than the file has tensors"),
        ({"model_args": {"depth": 1, "embed_dim": 1 << 24, "num_heads": 2}}, "describes .* weights"),
        ({"pretrained_cfg": {"input_size": [3, 1 << 20, 1 << 20]}}, "describes .* weights"),
    ],
)
def test_a_folder_of_timm_with_other_types_or_sizes_is_refused(change, reason, tmp_path) -> None:
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **sizes)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": sizes | {"img_size": 32}}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_encoder(f"timm:local-dir:{tmp_path}").embed_dim == 24
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((CheckpointError, ValueError), match=reason):
        load_encoder(f"timm:local-dir:{tmp_path}")


def test_a_pickle_may_not_claim_more_numbers_than_it_holds(tmp_path) -> None:
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"encoder": {"patch_embed.proj.weight": huge}}, tmp_path / "huge.pth")
    with pytest.raises(CheckpointError, match=r"huge\.pth is damaged: its tensors have .* more than the file"):
        load_encoder(tmp_path / "huge.pth")


def test_a_checkpoint_may_not_claim_larger_tensors_than_its_files_hold(tmp_path) -> None:
    checkpoint = stored(tmp_path, "run", node())
    shard = next(checkpoint.glob("*.safetensors"))
    tensors = load_file(shard)
    claims = {name: {"saved_offsets": [1 << 40] * tensor.ndim} for name, tensor in tensors.items()}
    save_file(tensors, shard, metadata={"DCP_SHARDING_INFO": json.dumps(claims), "DCP_VERSION": "1.0"})
    with pytest.raises(CheckpointError, match=r"its headers state .* bytes of tensors"):
        load_model(checkpoint)


@pytest.fixture
def own_encoder(tmp_path, monkeypatch) -> str:
    (tmp_path / "mine.py").write_text(
        "from jepa.encoders.spatial import SpatialEncoder\n\n\nclass Mine(SpatialEncoder):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "mine.Mine"
    sys.modules.pop("mine", None)


@pytest.mark.slow
def test_a_run_with_an_encoder_of_ones_own_is_trained_and_resumed_and_named_where_it_is_only_read(own_encoder) -> None:
    config = compose([*TINY, f"encoder._target_={own_encoder}", "name=mine"])
    agent = JEPAAgent(config)
    agent.train()
    links, run = Path("outputs/mine/checkpoints"), Path("outputs/mine/run.json")
    (links / "last").unlink()
    (links / "last").symlink_to("step_00000001")
    run.write_text(run.read_text().replace("finished", "stopped"))
    agent.train()
    assert (links / "last").resolve().name == "step_00000002"
    with pytest.raises(CheckpointError, match=r"encoder mine\.Mine is not one of jepa\.encoders.*the command that beg"):
        load_encoder("outputs/mine")
    assert load_model(links / "step_00000002", "target_encoder.").keys() >= {"embed.weight"}
