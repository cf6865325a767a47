"""Published weights: translated names, accepted and refused files, and equality with the original models."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from jepa.config import factory
from jepa.encoders.names import IJEPA, PUBLISHED, TABLE, VJEPA2, from_foreign, to_foreign
from jepa.encoders.pretrained import open_encoder, pretrained_encoder
from jepa.encoders.published import write_encoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.position import sincos, waves
from jepa.runs.checkpoint import CheckpointError
from jepa.types import PatchGrid

IMAGE = {"clip_shape": (3, 1, 16, 24), "patch_size": (8, 4), "embed_dim": 24, "depth": 3, "num_heads": 2}
CLIP = {"clip_shape": (3, 4, 16, 24), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tensors_of(encoder) -> dict[str, torch.Tensor]:
    return encoder.state_dict() | {TABLE: encoder.positions.table}


@pytest.mark.parametrize(
    ("names", "encoder", "patch"),
    [
        (PUBLISHED, SpatialEncoder(**IMAGE), (3, 8, 4)),
        (PUBLISHED, TemporalEncoder(**CLIP), (3, 2, 8, 8)),
        (IJEPA, SpatialEncoder(**IMAGE), (3, 8, 4)),
        (VJEPA2, TemporalEncoder(**CLIP), (3, 2, 8, 8)),
    ],
    ids=["published-image", "published-clip", "ijepa", "vjepa2"],
)
def test_names_are_translated_in_both_directions(names, encoder, patch) -> None:
    ours = tensors_of(encoder)
    theirs = to_foreign(ours, names, patch)
    back = from_foreign(theirs | {"head.weight": torch.ones(1)}, names)
    assert back.keys() == ours.keys() - ({TABLE} if names is VJEPA2 else set())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())


def test_published_names_are_those_of_timm() -> None:
    encoder = SpatialEncoder(**IMAGE).eval()
    vit = VisionTransformer(
        img_size=(16, 24), patch_size=(8, 4), embed_dim=24, depth=3, num_heads=2,
        num_classes=0, class_token=False, global_pool="",
    ).eval()  # fmt: skip
    vit.load_state_dict(to_foreign(tensors_of(encoder), PUBLISHED, (3, 8, 4)))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), vit.forward_features(images))


def test_a_missing_tensor_is_named() -> None:
    theirs = to_foreign(tensors_of(SpatialEncoder(**IMAGE)), IJEPA, (3, 8, 4))
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(KeyError, match=r"encoder\.layer\.1\.attention\.attention\.key\.bias"):
        from_foreign(theirs, IJEPA)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, tuple[Path, nn.Module]]:
    """Folders of transformers with random configurations and weights, and the models that wrote them."""
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    image = {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 52,
        "image_size": [32, 48], "patch_size": [16, 8], "layer_norm_eps": 0.03, "hidden_act": "gelu",
    }  # fmt: skip
    clip = {
        "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 48 / 11, "crop_size": 32,
        "patch_size": 8, "frames_per_clip": 6, "tubelet_size": 3, "in_chans": 1, "layer_norm_eps": 0.03,
        "pred_hidden_size": 12, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
    }  # fmt: skip
    models = {
        "ijepa": tf.IJepaModel(tf.IJepaConfig(**image)),
        "no-bias": tf.IJepaModel(tf.IJepaConfig(**image | {"qkv_bias": False}), add_pooling_layer=True),
        "classifier": tf.IJepaForImageClassification(tf.IJepaConfig(**image)),
        "vjepa2": tf.VJEPA2Model(tf.VJEPA2Config(**clip)),
    }
    folder = tmp_path_factory.mktemp("transformers")
    for name, model in models.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.eval().save_pretrained(folder / name, max_shard_size="20KB" if name == "vjepa2" else "1GB")
    return {name: (folder / name, getattr(model, "ijepa", model)) for name, model in models.items()}


@pytest.mark.parametrize("name", ["ijepa", "no-bias", "classifier"])
@torch.no_grad()
def test_an_ijepa_model_of_transformers_is_the_same_function(theirs, name) -> None:
    folder, model = theirs[name]
    images = noise(2, 3, 32, 48)
    torch.testing.assert_close(open_encoder(folder)(images), model(images).last_hidden_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_vjepa2_model_of_transformers_is_the_same_function_from_shards(theirs) -> None:
    folder, model = theirs["vjepa2"]
    assert (folder / "model.safetensors.index.json").is_file()
    encoder, clips = open_encoder(folder), noise(2, 1, 6, 32, 32)
    expected = model(clips.transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder(clips), expected, rtol=1e-4, atol=1e-4)
    assert encoder.clip_shape == (1, 6, 32, 32)


def changed_config(folder: Path, into: Path, **values) -> Path:
    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | values
    (into / "config.json").write_text(json.dumps(config))
    return into


def test_an_unsupported_activation_is_refused(theirs, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_act=gelu_new.*exact gelu"):
        open_encoder(changed_config(theirs["ijepa"][0], tmp_path / "new", hidden_act="gelu_new"))


@torch.no_grad()
def test_pixel_statistics_are_those_of_the_preprocessor_if_there_is_one(theirs, tmp_path) -> None:
    folder = changed_config(theirs["ijepa"][0], tmp_path / "coloured")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]}')
    clips = open_encoder(folder).transform(torch.full((1, 3, 32, 48), 255, dtype=torch.uint8))
    torch.testing.assert_close(clips.mean(dim=(0, 2, 3, 4)), torch.tensor([0.9, 1.6, 2.8]))


def vit(**sizes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=192, depth=2, num_heads=3, class_token=False, global_pool="",
        num_classes=0, **sizes,
    )  # fmt: skip
    return model.eval()


def save(path: Path, encoder: dict[str, torch.Tensor], prefix: str = "module.", **others) -> Path:
    """As I-JEPA and V-JEPA save it, with different weights in the context encoder."""
    named = {f"{prefix}{name}": tensor for name, tensor in encoder.items()}
    wrong = {name: tensor + 1 for name, tensor in named.items()}
    torch.save({"encoder": wrong, "target_encoder": named, "epoch": 3, "scaler": None, **others}, path)
    return path


@torch.no_grad()
def test_a_file_of_ijepa_is_the_function_of_its_target_encoder(tmp_path) -> None:
    model, images = vit(), noise(2, 3, 16, 16)
    encoder = open_encoder(save(tmp_path / "vit.pth.tar", model.state_dict()))
    torch.testing.assert_close(encoder(images), model.forward_features(images))
    assert (encoder.num_heads, encoder.clip_shape) == (3, (3, 1, 16, 16))


def clip_tensors(grid: PatchGrid, table: bool) -> tuple[dict[str, torch.Tensor], nn.Conv3d]:
    """As in V-JEPA the first half of a position encodes the time; 16 tokens fit three square grids."""
    embed = nn.Conv3d(3, 192, (2, 4, 4), (2, 4, 4))
    tensors = {name: tensor for name, tensor in vit().state_dict().items() if not name.startswith(("pos", "patch"))}
    tensors |= {f"patch_embed.proj.{name}": tensor for name, tensor in embed.state_dict().items()}
    if table:
        time = waves(torch.arange(grid.num_tokens) // (grid.h * grid.w), 96).float()
        space = sincos(PatchGrid(1, grid.h, grid.w), 96).repeat(grid.t, 1)
        tensors["pos_embed"] = torch.cat([time, space], dim=1)[None]
    return tensors, embed


@torch.no_grad()
def test_a_file_of_vjepa_is_the_same_function_on_the_grid_of_its_positions(tmp_path) -> None:
    tensors, embed = clip_tensors(PatchGrid(4, 2, 2), table=True)
    predictor = {f"module.backbone.mask_tokens.{number}": torch.zeros(1, 1, 8) for number in range(2)}
    encoder = open_encoder(save(tmp_path / "v.pth.tar", tensors, "module.backbone.", predictor=predictor))
    assert encoder.clip_shape == (3, 8, 8, 8)
    clips, model = noise(2, 3, 8, 8, 8), vit()
    expected = model.norm(model.blocks(embed(clips).flatten(2).mT + tensors["pos_embed"]))
    torch.testing.assert_close(encoder(clips), expected)


@torch.no_grad()
@pytest.mark.parametrize("has_unused_table", [False, True])
def test_a_file_of_vjepa2_is_the_function_of_the_model_in_transformers(theirs, has_unused_table, tmp_path) -> None:
    folder, model = theirs["vjepa2"]
    saved = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    tensors = to_foreign(from_foreign(saved, VJEPA2), PUBLISHED, (1, 3, 8, 8))
    predictor = {}
    if has_unused_table:  # the published files have one, and ten mask tokens
        tensors["pos_embed"] = noise(1, 64, 36)
        predictor = {f"module.backbone.mask_tokens.{number}": torch.zeros(1, 1, 8) for number in range(10)}
    path = save(tmp_path / "vitl.pt", tensors, "module.backbone.", predictor=predictor)
    encoder = pretrained_encoder(clip_shape=(1, 6, 32, 32), weights=str(path), attention_heads=2)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = 0.03
    clips = noise(2, 1, 6, 32, 32)
    expected = model(clips.transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder(clips), expected, rtol=1e-4, atol=1e-4)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def bare(**changes) -> dict[str, torch.Tensor]:
    return {k: v for k, v in (vit().state_dict() | changes).items() if v is not None}


def in_file(path: Path, what) -> Path:
    torch.save(what, path)
    return path


def in_folder(path: Path, config, **files: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def cut(path: Path) -> Path:
    save(path, bare())
    path.write_bytes(path.read_bytes()[:5000])
    return path


INDEX = json.dumps({"weight_map": {"a": "../x"}}).encode()
REFUSED = {
    "code": (lambda p: in_file(p, {"target_encoder": Harmful()}), "names code to run"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Harmful(), protocol=2)) and p, "names code to run"),
    "text": (lambda p: p.write_text("hello") and p, "no checkpoint of PyTorch"),
    "cut": (cut, "damaged or no checkpoint"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").close() or p, "damaged or no checkpoint"),
    "list": (lambda p: in_file(p, [1]), "holds a list"),
    "others": (lambda p: in_file(p, {"epoch": 1, "opt": {}}), "neither target_encoder nor encoder, but epoch, opt"),
    "convolutions": (lambda p: in_file(p, {"conv1.weight": torch.ones(2)}), r"lacks patch_embed\.proj\.weight"),
    "lacking": (
        lambda p: save(p, bare(**{f"blocks.1.{n}.bias": None for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")})),
        r"lacks blocks\.1\.mlp\.fc1\.bias, blocks\.1\.mlp\.fc2\.bias, blocks\.1\.norm1\.bias and 1 more",
    ),
    "architecture": (lambda p: save(p, bare(cls_token=torch.ones(1))), "another architecture: it also has cls_token"),
    "shape": (lambda p: save(p, bare(**{"norm.weight": torch.ones(7)})), r"norm\.weight \[7\] instead of \[192\]"),
    "width": (
        lambda p: save(p, {k: v[..., :5] if v.ndim < 4 else v[:5] for k, v in bare().items()}),
        "attention_heads",
    ),
    "table": (lambda p: save(p, bare(pos_embed=torch.ones(1, 15, 192))), "15 positions"),
    "nothing": (lambda p: p, "does not exist; expected a run"),
    "folder": (lambda p: p.mkdir() or p, "no known weights"),
    "bert": (lambda p: in_folder(p, {"model_type": "bert"}), "says model_type=bert"),
    "timm": (lambda p: in_folder(p, {"architecture": "vit"}), "write timm:local-dir"),
    "no weights": (lambda p: in_folder(p, {"model_type": "ijepa"}), r"has no model\.safetensors"),
    "elsewhere": (lambda p: in_folder(p, {"model_type": "ijepa"}, model__safetensors__index__json=INDEX), r"no \.\./x"),
    "garbage": (lambda p: in_folder(p, {"model_type": "ijepa"}, model__safetensors=b"12345678"), "is damaged"),
    "json": (lambda p: in_folder(p, [1]), "holds no mapping"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sources_without_an_encoder_are_refused_by_name(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = REFUSED[name]
    path = make(tmp_path / "source")
    with pytest.raises(CheckpointError, match=reason) as refusal:
        open_encoder(path)
    assert "source" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "harmed").exists()


def test_a_model_that_is_not_on_this_machine_is_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing is not on this machine") as refusal:
        open_encoder("hf:nobody/nothing")
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_an_encoder_is_written_and_read_again_without_its_source(tmp_path) -> None:
    source = save(tmp_path / "vit.pth.tar", bare())
    encoder = open_encoder(source)
    write_encoder(tmp_path / "out", encoder)
    source.unlink()
    again, images = open_encoder(tmp_path / "out"), noise(2, 3, 16, 16)
    assert torch.equal(again(images), encoder(images))
    pixels = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(again.transform(pixels), encoder.transform(pixels))
    assert factory(again.node)().state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    "change",
    [{"_target_": "os.system"}, {"patch_size": {"_target_": "os.getcwd"}}, {"patch_size": [{"_target_": "x"}]}],
)
def test_an_export_that_names_code_is_refused(change, tmp_path) -> None:
    write_encoder(tmp_path / "out", open_encoder(save(tmp_path / "vit.pth.tar", bare())))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["encoder"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is not one of jepa\.encoders|patch_size takes a whole number"):
        open_encoder(tmp_path / "out")


def test_fresh_is_the_same_architecture_with_other_weights(tmp_path) -> None:
    path = save(tmp_path / "vit.pth.tar", bare())
    trained, fresh = open_encoder(path), open_encoder(path, fresh=True)
    assert trained.node == fresh.node
    assert not torch.equal(trained.embed.weight, fresh.embed.weight)


@torch.no_grad()
def test_positions_are_resampled_once_for_another_clip_shape(tmp_path) -> None:
    path, images = save(tmp_path / "vit.pth.tar", bare()), noise(2, 3, 24, 8)
    larger = open_encoder(path, clip_shape=(3, 1, 24, 8))
    assert larger.positions.table.shape == (12, 192)
    torch.testing.assert_close(larger(images), open_encoder(path)(images))


def test_images_of_other_channels_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="reads 3 channels, the data set has 1"):
        open_encoder(save(tmp_path / "vit.pth.tar", bare()), clip_shape=(1, 1, 16, 16))
