"""Every optimizer of the group trains, and a resumed run takes the steps that an undisturbed one takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from timm.optim.muon import Muon
from tiny_agent import agent

from jepa.config.catalogue import conf_folder
from jepa.encoders.spatial import SpatialEncoder
from jepa.optim import parameter_groups
from jepa.runs.checkpoint import load_model

pytestmark = pytest.mark.slow

OPTIMIZERS = sorted(path.stem for path in Path(conf_folder(), "optimizer").glob("*.yaml"))


def test_the_group_has_what_others_expect() -> None:
    assert {"adamw", "muon", "sgd", "lars", "lamb"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    overrides = [f"optimizer={name}", "steps=6", "save_every=3", "evaluator=[]", "lr=1e-2"]
    agent(tmp_path / "whole", *overrides).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "parted", symlinks=True)
    for made in ("run.json", "checkpoints/last"):
        (tmp_path / "parted" / made).unlink()
    shutil.rmtree(tmp_path / "parted/checkpoints/step_00000006")
    (tmp_path / "parted/checkpoints/last").symlink_to("step_00000003")
    agent(tmp_path / "parted", *overrides).train()
    half, whole, parted = (
        load_model(tmp_path / folder)
        for folder in ("whole/checkpoints/step_00000003", "whole/checkpoints/last", "parted/checkpoints/last")
    )
    assert any(not torch.equal(half[key], whole[key]) for key in half if "context_encoder.blocks" in key)
    for key, tensor in whole.items():
        assert torch.equal(parted[key], tensor), key


def test_muon_changes_hidden_matrices_by_orthogonal_steps_and_all_else_as_adamw_does() -> None:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(3, 1, 16, 16), patch_size=8, embed_dim=16, depth=1, num_heads=2)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = Muon(parameter_groups(encoder), lr=0.1, weight_decay=0.0, adjust_lr_fn="original")
    encoder(torch.randn(4, 3, 16, 16)).sin().sum().backward()
    optimizer.step()
    changes = {name: (before[name] - parameter).detach() / 0.1 for name, parameter in encoder.named_parameters()}
    scales = torch.linalg.svdvals(changes["blocks.0.attn.proj.weight"])
    assert scales.max() < 1.3
    assert scales[len(scales) // 2] > 0.8  # a gradient of few samples has few directions
    torch.testing.assert_close(
        changes["embed.weight"].abs(), torch.ones_like(changes["embed.weight"]), atol=1e-3, rtol=0
    )
