"""Pretrained encoders: stored positions, timm's models, and runs that start from a source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed

from jepa import JEPAAgent, JEPAConfig, load_encoder
from jepa.config import Composer, ConfigError, compose, factory
from jepa.encoders.pretrained import TimmEncoder, open_encoder
from jepa.encoders.published import write_encoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.position import resample
from jepa.resources.estimate import FakeModel
from jepa.runs.checkpoint import CheckpointError
from jepa.training.assemble import make_dataset, make_objective, make_plan, split_phases
from jepa.types import PatchGrid

SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(5, 6), (2, 3), (4, 3)])
def test_a_table_is_resampled_in_space_as_timm_does_it(size) -> None:
    table = noise(12, 8)
    ours = resample(table, PatchGrid(1, 4, 3), PatchGrid(1, *size))
    timms = resample_abs_pos_embed(table[None], new_size=size, old_size=(4, 3), num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(ours, timms[0])


def test_a_table_is_resampled_in_time_on_straight_lines() -> None:
    grid = PatchGrid(4, 2, 3)
    rows = torch.arange(4.0).repeat_interleave(6)[:, None].expand(-1, 5)  # the time itself
    halves = resample(rows, grid, PatchGrid(2, 2, 3))
    torch.testing.assert_close(halves, torch.tensor([0.5, 2.5]).repeat_interleave(6)[:, None].expand(-1, 5))


@pytest.mark.parametrize(("kind", "clip_shape"), [(SpatialEncoder, (3, 1, 32, 24)), (TemporalEncoder, (3, 4, 32, 24))])
def test_stored_positions_are_initially_sin_cos_and_not_trained(kind, clip_shape) -> None:
    torch.manual_seed(0)
    plain = kind(clip_shape=clip_shape, **SIZES)
    torch.manual_seed(0)
    stored = kind(clip_shape=clip_shape, **SIZES, position="table")
    clips, keep = noise(2, *clip_shape), torch.tensor([[0, 5, 7], [1, 2, 10]])
    assert torch.equal(plain(clips, keep), stored(clips, keep))
    assert stored.state_dict().keys() - plain.state_dict().keys() == {"positions.table"}
    assert dict(stored.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    with torch.no_grad():
        stored.positions.table.add_(1)
    assert not torch.equal(stored(clips), plain(clips))
    torch.manual_seed(0)
    again = kind(clip_shape=clip_shape, **SIZES, position="table")
    assert torch.equal(again(clips), plain(clips)), "tables of two encoders are one tensor"


def test_stored_positions_of_another_grid_are_those_of_the_clip_shape_resampled() -> None:
    encoder = SpatialEncoder(clip_shape=(3, 1, 32, 24), **SIZES, position="table").eval()
    larger = SpatialEncoder(clip_shape=(3, 1, 40, 48), **SIZES, position="table").eval()
    table = resample(encoder.positions.table, encoder.frame_grid, larger.frame_grid)
    larger.load_state_dict(encoder.state_dict() | {"positions.table": table})
    images = noise(2, 3, 40, 48)
    torch.testing.assert_close(encoder(images), larger(images))


def test_layer_norms_have_the_configured_epsilon() -> None:
    encoder = SpatialEncoder(clip_shape=(3, 1, 16, 16), **SIZES, norm_eps=0.5)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.5] * 5


PLAIN = {"depth": 2, "embed_dim": 24, "num_heads": 2}
MODELS = {
    "class": ("vit_tiny_patch16_224", PLAIN),
    "registers": ("vit_tiny_patch16_224", PLAIN | {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.5}),
    "averaged": ("vit_tiny_patch16_224", PLAIN | {"class_token": False, "global_pool": "avg"}),
    "rotary": ("vit_small_patch16_dinov3", PLAIN),
}


def timm_encoder(name: str, **values) -> TimmEncoder:
    torch.manual_seed(0)
    architecture, arguments = MODELS[name]
    encoder = TimmEncoder(clip_shape=(3, 1, 32, 48), architecture=architecture, arguments=arguments, **values)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def timm_model(encoder: TimmEncoder, size=(32, 48)):
    architecture, arguments = encoder.node["architecture"], encoder.node["arguments"]
    model = timm.create_model(architecture, **arguments, num_classes=0, img_size=(32, 48))
    model.load_state_dict(encoder.trunk.state_dict())
    model.set_input_size(size)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_timm_encoder_gives_the_patch_tokens_of_the_model(name) -> None:
    encoder, images = timm_encoder(name), noise(2, 3, 32, 48)
    model = timm_model(encoder)
    expected = model.fc_norm(model.forward_features(images))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(images), expected)
    torch.testing.assert_close(encoder(images, keep=torch.arange(6).expand(2, -1)), expected)
    frames = noise(2, 3, 2, 32, 48)
    apart = [encoder(frames[:, :, number]) for number in range(2)]
    torch.testing.assert_close(encoder(frames), torch.cat(apart, dim=1))
    assert encoder.num_prefix_tokens == model.num_prefix_tokens


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_kept_tokens_do_not_attend_to_the_others(name) -> None:
    """The reference runs all tokens and masks those that are not kept in the attention."""
    encoder, images, keep = timm_encoder(name), noise(2, 3, 32, 48), torch.tensor([[0, 3, 4], [1, 2, 5]])
    model, prefix = timm_model(encoder), encoder.num_prefix_tokens
    visible = torch.zeros(2, prefix + 6, dtype=torch.bool)
    visible[:, :prefix] = True
    visible.scatter_(1, keep + prefix, True)
    mask = visible[:, None, None].expand(-1, -1, prefix + 6, -1)
    tokens = model.fc_norm(model.forward_features(images, attn_mask=mask))[:, prefix:]
    expected = torch.stack([row[indices] for row, indices in zip(tokens, keep, strict=True)])
    torch.testing.assert_close(encoder(images, keep=keep), expected)


@torch.no_grad()
def test_positions_of_a_timm_encoder_are_resampled_as_timm_does_it() -> None:
    encoder, images = timm_encoder("class"), noise(2, 3, 64, 32)
    expected = timm_model(encoder, (64, 32)).forward_features(images)[:, 1:]
    torch.testing.assert_close(encoder(images), expected)


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain, checkpointed = timm_encoder("rotary"), timm_encoder("rotary", checkpoint_activations=True)
    images, keep = noise(2, 3, 32, 48), torch.tensor([[0, 3, 4], [1, 2, 5]])
    for encoder in (plain, checkpointed):
        encoder(images, keep).square().mean().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def timm_folder(path: Path, encoder: TimmEncoder, drop: str = "-") -> Path:
    path.mkdir()
    tensors = {k: v for k, v in encoder.trunk.state_dict().items() if k != drop}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    pretrained_cfg = {"num_classes": 0, "input_size": [3, 32, 48], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 1.0]}
    config = {"architecture": encoder.node["architecture"], "num_classes": 0, "pretrained_cfg": pretrained_cfg}
    config["model_args"] = encoder.node["arguments"] | {"img_size": [32, 48]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@torch.no_grad()
def test_a_folder_of_timm_is_opened_and_can_then_be_deleted(tmp_path) -> None:
    original = timm_encoder("registers")
    folder = timm_folder(tmp_path / "timm", original)
    encoder, images = load_encoder(f"timm:local-dir:{folder}"), noise(2, 3, 32, 48)
    assert torch.equal(encoder(images), original(images))
    torch.testing.assert_close(encoder.transform.normalise.mean, (0.1, 0.2, 0.3))
    write_encoder(tmp_path / "out", encoder)
    shutil.rmtree(folder)
    assert torch.equal(load_encoder(tmp_path / "out")(images), original(images))
    assert factory(encoder.node)().state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        ("timm:vit_tiny_patch16_225", ValueError, 'no such model; did you mean "vit_tiny_patch16_224'),
        ("timm:vit_tiny_patch16_224.nonsense", ValueError, "nonsense"),
        ("timm:resnet18", ValueError, "no plain Vision Transformer"),
        ("timm:deit_tiny_distilled_patch16_224", ValueError, "but VisionTransformerDistilled"),
        ("timm:vit_tiny_r_s16_p8_224", ValueError, "with HybridEmbed"),
        ("timm:vit_small_patch16_rope_mixed_224", ValueError, "learned rotary positions"),
        ("timm:a/b", CheckpointError, "names no model of timm"),
        ("timm:local-dir:/nowhere", CheckpointError, "/nowhere is no folder of timm"),
        ("hf:justaname", CheckpointError, "expected hf:ORG/NAME"),
    ],
)
def test_a_model_that_cannot_be_wrapped_is_refused_with_the_reason(source, error, reason) -> None:
    with pytest.raises(error, match=reason):
        open_encoder(source, fresh=True)


def test_a_folder_of_timm_that_lacks_a_tensor_is_refused(tmp_path) -> None:
    folder = timm_folder(tmp_path / "timm", timm_encoder("class"), drop="blocks.1.norm1.bias")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.bias"):
        open_encoder(f"timm:local-dir:{folder}")


def test_a_timm_encoder_of_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="use num_frames=1"):
        TimmEncoder(clip_shape=(3, 4, 32, 32), architecture="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="single images"):
        timm_encoder("class")(noise(1, 3, 2, 32, 48), keep=torch.zeros(1, 3, dtype=torch.long))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An encoder with stored positions, of images of 16 pixels."""
    torch.manual_seed(0)
    node = {"_target_": "jepa.encoders.spatial.SpatialEncoder", "clip_shape": [3, 1, 16, 16], **SIZES}
    node |= {"patch_size": 4, "position": "table"}
    encoder = factory(node)()
    encoder.positions.table.normal_()
    encoder.node = node
    folder = tmp_path_factory.mktemp("weights") / "first"
    encoder.transform = open_encoder("timm:vit_tiny_patch16_224", fresh=True, clip_shape=(3, 1, 16, 16)).transform
    write_encoder(folder, encoder)
    return folder


def overrides(source: Path | str) -> list[str]:
    return [
        *(
            "encoder=pretrained",
            f"encoder.weights={source}",
            "image_size=24",
            "steps=4",
            "save_every=2",
            "eval_every=4",
        ),
        *("dataset=shapes", "dataset.num_samples=32", "dataset.side=24", "batch_size=4", "num_workers=0", "device=cpu"),
        *("predictor.width=16", "predictor.depth=1", "mask=random", "precision=fp32", "logger=none", "evaluator=[]"),
    ]


def test_both_encoders_begin_with_the_weights_at_the_size_of_the_run(source) -> None:
    config = compose(overrides(source))
    dataset = make_dataset(config)
    objective, _ = make_objective(config, dataset, make_plan(split_phases(config, len(dataset))[0], len(dataset)))
    stored = load_file(source / "model.safetensors")
    stored["positions.table"] = resample(stored["positions.table"], PatchGrid(1, 4, 4), PatchGrid(1, 6, 6))
    for encoder in (objective.context_encoder, objective.target_encoder):
        state = encoder.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


@pytest.mark.slow
def test_a_run_from_weights_resumes_bit_by_bit_and_is_loaded_without_them(source, tmp_path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(source, weights)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    JEPAAgent(JEPAConfig(*overrides(weights)), folder=whole).train()
    shutil.copytree(whole, resumed, symlinks=True)
    for name in ("checkpoints/step_00000004", "checkpoints/last"):
        path = resumed / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    (resumed / "checkpoints" / "last").symlink_to("step_00000002")
    (resumed / "run.json").write_text((whole / "run.json").read_text().replace("finished", "stopped"))
    JEPAAgent(JEPAConfig(*overrides(weights)), folder=resumed).train()
    shutil.rmtree(weights)
    one, other, halfway = (load_encoder(f) for f in (whole, resumed, resumed / "checkpoints" / "step_00000002"))
    states = [encoder.state_dict() for encoder in (one, other, halfway)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(one.embed.weight, halfway.embed.weight), "nothing was trained after the second step"
    assert one.clip_shape == (3, 1, 24, 24)
    assert torch.equal(load_encoder(whole)(noise(1, 3, 24, 24)), one(noise(1, 3, 24, 24)))


def test_phases_of_several_sizes_are_refused_with_stored_positions(source, tmp_path) -> None:
    phases = "phases=[{share:0.5,image_size:16},{share:0.5,image_size:24}]"
    with pytest.raises(ConfigError, match="phases: these weights keep positions of one size"):
        JEPAAgent(JEPAConfig(*overrides(source), phases), folder=tmp_path / "run").train()


def test_the_estimate_of_a_run_has_the_sizes_of_its_weights(source) -> None:
    config = compose(overrides(source))
    backbone = FakeModel(config, make_dataset(config)).objective.backbone
    shapes = {name: tensor.shape for name, tensor in load_file(source / "model.safetensors").items()}
    del shapes["positions.table"]
    assert {name: parameter.shape for name, parameter in backbone.named_parameters()} == shapes
    assert {type(p).__name__ for p in backbone.parameters()} == {"FakeTensor"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([], None),
        (["experiment=quickstart"], None),
        (["size=small"], "size=small: encoder=pretrained has the sizes of its weights"),
        (["encoder.depth=3"], "encoder.depth=3: encoder=pretrained has the sizes of its weights"),
        (["encoder.num_heads=3"], "encoder.num_heads=3: encoder=pretrained has the sizes of its weights"),
        (["encoder.patch_size=8"], "the chosen encoder has no 'patch_size'"),
        (["encoder.weights=/nowhere"], "encoder.weights=/nowhere: /nowhere does not exist; expected a run"),
    ],
)
def test_sizes_come_from_the_weights_alone(source, changes, reason) -> None:
    result = Composer().check([*overrides(source), *changes])
    if reason is None:
        assert result.errors == []
        assert set(result.config["encoder"]) == {
            *("_target_", "weights", "fresh", "attention_heads", "drop_path", "checkpoint_activations"),
        }
    else:
        assert [fault for fault in result.errors if fault.startswith(reason) or reason in fault] == result.errors != []


def test_weights_must_be_given() -> None:
    assert any("encoder.weights=VALUE" in fault for fault in Composer().check(["encoder=pretrained"]).errors)
