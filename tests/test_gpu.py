"""What only a GPU can show, run by `make gpu-check`; all but whole runs does without Hydra."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa import load_policy
from jepa.cli.rl import main as rl
from jepa.data.transforms import Augment
from jepa.encoders.spatial import SpatialEncoder
from jepa.layers.stems import fit_stem
from jepa.masks.block import BlockMasker
from jepa.objectives.jepa import JEPA
from jepa.optim import parameter_groups, set_schedule
from jepa.parallel.session import open_session
from jepa.predictors.cross_attention import CrossAttentionPredictor
from jepa.predictors.transformer import TransformerPredictor
from jepa.runs.metrics import read_rows
from jepa.seeding import generator
from jepa.training.step import train_step
from jepa.types import Batch, Masks, PatchGrid, RawBatch

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BATCH = 16
PREDICTORS = {
    "joint": TransformerPredictor,
    "apart": lambda **sizes: TransformerPredictor(joint=False, **sizes),
    "cross_attention": CrossAttentionPredictor,
}


def make_objective(predictor: str = "joint") -> JEPA:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(3, 1, 32, 32), patch_size=4, embed_dim=64, depth=2, num_heads=4)
    head = PREDICTORS[predictor](grid=encoder.grid, embed_dim=64, num_heads=4, width=32, depth=2)
    return JEPA(encoder=encoder, predictor=head, batch_size=BATCH, total_steps=1000, momentum=0.99)


def make_batch(device: torch.device = DEVICE) -> tuple[Batch, Masks]:
    clips = torch.randn(BATCH, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    masks = BlockMasker(grid=PatchGrid(1, 8, 8))(BATCH, generator(0, 0, 0, "masks"))
    return Batch(clips, {"labels": torch.zeros(BATCH, dtype=torch.long)}), Masks(*(mask.to(device) for mask in masks))


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_bf16_training_steps_lower_the_loss(predictor: str) -> None:
    session = open_session(device="cuda", precision="auto")
    assert session.bf16
    objective = make_objective(predictor).to(DEVICE).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective), fused=True)
    set_schedule(optimizer, lr=1e-3, weight_decay=0.0)
    batch, masks = make_batch()
    losses = []
    for step in range(60):
        output = train_step(
            objective,
            optimizer,
            batch,
            masks,
            micro_batch_size=BATCH // 2,
            autocast=session.autocast,
            clip_grad=1.0,
            guard=None,
            seed=0,
        )
        objective.after_step(step)
        losses.append(output.loss)
    means = torch.stack(losses).unflatten(0, (6, 10)).mean(dim=1).tolist()
    assert means[-1] < 0.8 * means[0]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_gpu_and_cpu_agree_on_loss_and_gradients(predictor: str) -> None:
    losses, gradients = [], []
    for device in (torch.device("cpu"), DEVICE):
        objective = make_objective(predictor).to(device).train()
        loss = objective(*make_batch(device)).loss
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in objective.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_compiled_objective_agrees_with_the_plain_one() -> None:
    objective = make_objective().to(DEVICE).train()
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(module.graph.nodes))
        return module

    batch, masks = make_batch()
    plain = objective(batch, masks).loss
    torch.testing.assert_close(torch.compile(objective, backend=count)(batch, masks).loss, plain, rtol=1e-4, atol=1e-5)
    assert sum(graphs) > 50, "nothing was compiled"
    fast = torch.compile(objective)(batch, masks).loss
    fast.backward()
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stem", ["conv", "residual", "dictionary"])
def test_stems_agree_with_the_cpu_and_a_dictionary_is_fitted_on_it(stem: str) -> None:
    torch.manual_seed(0)
    encoder = SpatialEncoder(
        clip_shape=(3, 1, 32, 32), patch_size=8, embed_dim=64, depth=1, num_heads=4, stem=stem, stem_width=32
    )
    clips, keep = torch.randn(BATCH, 3, 1, 32, 32), torch.arange(5).expand(BATCH, 5)
    if stem == "dictionary":
        fit_stem(encoder, [clips], len(clips), torch.Generator().manual_seed(0))
    expected, some = encoder(clips), encoder(clips, keep=keep)
    on_gpu = encoder.to(DEVICE)
    torch.testing.assert_close(on_gpu(clips.to(DEVICE)).cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(on_gpu(clips.to(DEVICE), keep=keep.to(DEVICE)).cpu(), some, atol=1e-3, rtol=1e-3)


def test_augmentation_agrees_with_the_cpu() -> None:
    pixels = torch.randint(0, 256, (8, 3, 1, 90, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([[90, 70], [60, 70], [90, 40], [33, 35]]).repeat(2, 1)
    labels = torch.zeros(8, dtype=torch.long)
    raw = RawBatch(pixels, sizes, {"labels": labels}, torch.zeros(0, dtype=torch.long), torch.zeros_like(labels))
    moved = raw.map(lambda tensor: tensor.to(DEVICE))
    augment = Augment(
        image_size=(32, 48),
        crop_scale=(0.3, 1.0),
        crop_aspect=(0.75, 1.3333),
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
    )
    here, there = (augment(batch, generator(0, 0, 0, "augment")).clips for batch in (raw, moved))
    assert there.device.type == DEVICE.type
    assert (here - there.cpu()).abs().max() <= 1.5 / 255  # one grey level: the CPU's kernel rounds


def test_step_does_not_wait_for_the_device() -> None:
    session = open_session(device="cuda", precision="auto")
    objective = make_objective().to(DEVICE).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective), lr=1e-3, fused=True)
    batch, masks = make_batch()

    def step(number: int) -> None:
        train_step(
            objective,
            optimizer,
            batch,
            masks,
            micro_batch_size=BATCH,
            autocast=session.autocast,
            clip_grad=1.0,
            guard=None,
            seed=0,
        )
        objective.after_step(number)

    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("overrides", [["precision=fp32"], ["precision=bf16", "compile=true"], ["save_async=true"]])
def test_shards_on_one_gpu_train_and_save_as_one_process_does(tmp_path, overrides):
    pytest.importorskip("hydra")
    from jepa import JEPAAgent, JEPAConfig
    from jepa.runs.checkpoint import find, load_model

    sizes = ["image_size=32", "encoder.patch_size=8", "encoder.embed_dim=64", "encoder.depth=2", "encoder.num_heads=2"]
    sizes += ["predictor.width=32", "predictor.depth=1", "mask.ratio=0.5", "dataset.num_samples=64", "batch_size=16"]
    others = ["num_workers=0", "logger=none", "log_every=1", "device=cuda", "evaluator=[diagnostics]", "save_every=2"]
    losses = {}
    for strategy in ("single", "fsdp"):
        config = JEPAConfig(*sizes, *others, *overrides, "steps=6", f"strategy={strategy}")
        JEPAAgent(config, folder=tmp_path / strategy).train()
        losses[strategy] = [row["train/loss"] for row in read_rows(tmp_path / strategy) if "train/loss" in row]
    assert losses["fsdp"] == pytest.approx(losses["single"], rel=0.02)
    weights = [load_model(find(tmp_path / strategy)) for strategy in losses]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("world", ["jepa", "iris"])
def test_a_policy_is_trained_in_dreams_on_the_gpu(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = [
        "encoder.patch_size=4",
        "encoder.embed_dim=16",
        "encoder.num_heads=1",
        "num_frames=4",
        "batch_size=16",
        "evaluator=[]",
    ]
    sizes += ["objective.head_steps=20"] if world == "jepa" else ["objective.dynamics_width=16"]
    settings = f"world.settings=[{','.join(map(repr, sizes))}]"
    env = ["env=corridor", f"--config-dir={Path(__file__).parent / 'files' / 'corridor'}", "episode_steps=12"]
    steps = ["env_steps=120", "world_steps=10", "policy_steps=5", "batch_size=8", "horizon=3", "eval_episodes=4"]
    assert rl([*env, f"world={world}", settings, *steps, "rounds=2", "device=cuda", "name=dreamer"]) == 0
    (row, *_) = json.loads(Path("outputs/dreamer/results.json").read_text())["rows"]
    assert row["env_steps"] == 120
    assert load_policy("outputs/dreamer").act(np.zeros((8, 8, 1), dtype=np.uint8)) in (0, 1, 2)
