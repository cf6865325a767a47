"""The estimate of a run: counted on fake tensors, in agreement with real ones and with closed forms."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa.cli.train import main
from jepa.config import Composer, compose
from jepa.resources.advice import memory_advice
from jepa.resources.estimate import FakeModel, estimate, model_cost, seconds_text, size_text
from jepa.resources.footprint import Pass, block_sizes, measure, state_bytes
from jepa.resources.hardware import (
    GIB,
    GPUS,
    Cluster,
    ModelCost,
    RankLoad,
    fits,
    largest_micro_batch,
    memory,
    most_seconds,
    rank_load,
    step_time,
    traffic,
)
from jepa.seeding import generator
from jepa.training.assemble import make_objective
from jepa.types import Batch

IMAGES: Any = SimpleNamespace(channels=3, classes=())
MODELS = (
    [],
    ["encoder.checkpoint_activations=true"],
    ["predictor=cross_attention"],
    ["predictor.joint=false"],
    ["objective=mae", "mask=random"],
    ["regularizer=vicreg"],
    ["objective.target=stopgrad"],
)
COST = ModelCost(
    encoder=90_000_000,
    trained=100_000_000,
    frozen=90_000_000,
    block=7_000_000,
    outside_blocks=3_000_000,
    state=8,
    forward=5e10,
    backward=5e10,
    activations=5e7,
    workspace=1e6,
    casts=2e8,
)


def on_real_tensors(config: Any, samples: int) -> Pass:
    objective, masker = make_objective(config, IMAGES, SimpleNamespace(batch_size=samples, total_steps=1))  # pyright: ignore
    clips = torch.zeros(samples, *objective.backbone.clip_shape)
    masks = masker(samples, generator(0, 0, 0, "masks"))
    return measure(
        objective.train(), Batch(clips, {"labels": torch.zeros(samples, dtype=torch.long)}), masks, bf16=False
    )


def cluster(**changed: Any) -> Cluster:
    values = {"gpu": GPUS["h100"], "count": 8, "per_node": 8, "utilisation": 0.4, "bf16": True}
    return Cluster(**(values | changed))


@pytest.mark.parametrize("overrides", MODELS, ids=lambda overrides: ",".join(overrides) or "default")
def test_fake_tensors_cost_what_real_ones_do(overrides: list[str], tiny: list[str]) -> None:
    common = [one for one in tiny if "objective=mae" not in overrides or not one.startswith("predictor")]
    config = compose([*common, *overrides])
    real, cost = on_real_tensors(config, 4), model_cost(config, IMAGES, 4, bf16=False)
    assert (real.forward, real.backward) == (cost.forward * 4, cost.backward * 4)
    assert real.activations == cost.activations * 4
    assert real.peak == pytest.approx((cost.activations + cost.workspace) * 4, rel=0.02)


def test_flops_of_a_vision_transformer_are_those_of_the_closed_form(tiny: list[str]) -> None:
    """An encoder that sees K of N tokens and a target encoder that sees all: 24 n D^2 + 4 n^2 D in each block."""
    config = compose([*tiny, "encoder.depth=3", "predictor=cross_attention"])
    bare = compose([*tiny, "encoder.depth=2", "predictor=cross_attention"])
    width, tokens = 32, 16
    context = FakeModel(config, IMAGES).masks.context.shape[1]
    one, two = (model_cost(c, IMAGES, 2, bf16=False) for c in (config, bare))

    def block(n: int) -> int:
        return 24 * n * width**2 + 4 * n**2 * width

    assert one.forward - two.forward == block(tokens) + block(context)
    # twice the products of the forward pass, and those of the attention weights once more, which are not stored
    assert one.backward - two.backward == 2 * block(context) + 2 * context**2 * width


def test_activations_grow_with_the_samples(tiny: list[str]) -> None:
    config = compose(tiny)
    few, many = (model_cost(config, IMAGES, samples, bf16=True) for samples in (8, 32))
    assert many.activations == pytest.approx(few.activations, rel=0.02)
    assert many.casts == few.casts > 0


def test_checkpointing_stores_less_and_computes_more(tiny: list[str]) -> None:
    stored = model_cost(compose([*tiny, "encoder.depth=4"]), IMAGES, 4, bf16=False)
    config = compose([*tiny, "encoder.depth=4", "encoder.checkpoint_activations=true"])
    checkpointed = model_cost(config, IMAGES, 4, bf16=False)
    assert checkpointed.activations < stored.activations
    assert checkpointed.backward > stored.backward
    assert checkpointed.workspace > stored.workspace


def test_sizes_of_a_giant_take_no_memory() -> None:
    model = FakeModel(compose(["size=giant", "encoder.patch_size=14"]), IMAGES)
    assert sum(p.numel() for p in model.objective.backbone.parameters()) == pytest.approx(1011e6, rel=0.01)
    assert {type(p).__name__ for p in model.objective.parameters()} == {"FakeTensor"}


def test_counting_leaves_later_models_as_they_were(tiny: list[str]) -> None:
    config = compose(tiny)
    torch.manual_seed(3)
    model_cost(config, IMAGES, 2, bf16=False)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert on_real_tensors(config, 2).forward > 0


def test_blocks_and_what_is_outside_are_all_parameters(tiny: list[str]) -> None:
    model = FakeModel(compose([*tiny, "encoder.depth=3"]), IMAGES)
    block, rest = block_sizes(model.objective)
    whole = sum(p.numel() for p in model.objective.parameters())
    predictor = sum(p.numel() for p in model.objective.predictor.blocks.parameters())
    assert block == sum(p.numel() for p in model.objective.backbone.blocks[0].parameters())
    assert whole == rest + 6 * block + predictor


def test_optimizer_state_is_that_of_adam_or_of_none() -> None:
    assert state_bytes(torch.optim.AdamW) == 8
    assert state_bytes(torch.optim.SGD) == 0


@given(st.integers(1, 2048), st.sampled_from(["ddp", "fsdp"]))
def test_traffic_of_a_rank_is_that_of_rings(ranks: int, strategy: str) -> None:
    load = RankLoad(strategy=strategy, ranks=ranks, samples=8, micro_batch_size=4)
    moved = (ranks - 1) / ranks
    expected = 2 * moved * 4 * 100e6
    if strategy == "fsdp":
        expected = 2 * moved * (2 * 190e6 + 2 * 100e6 + 4 * 100e6)
    assert traffic(COST, load, cluster(count=ranks)) == pytest.approx(expected)


def test_shards_take_their_part_and_a_few_whole_blocks() -> None:
    whole, shards = (memory(COST, rank_load(name, 64, 512, None), cluster(count=64)) for name in ("ddp", "fsdp"))
    for part in ("weights", "target encoder", "gradients", "optimizer"):
        assert shards[part] == pytest.approx(whole[part] / 64)
    assert shards["communication"] == 2 * (3 * 7e6 + 3e6) + 8 * 7e6
    assert shards["activations"] == whole["activations"] == 8 * 5e7
    assert whole["weights"] + whole["gradients"] + whole["optimizer"] == 16 * 100e6


@given(st.sampled_from(["single", "ddp", "fsdp"]), st.integers(1, 8), st.floats(1, 100))
def test_largest_micro_batch_fits_and_the_next_divisor_does_not(strategy: str, ranks: int, gib: float) -> None:
    gpus = cluster(gpu=replace(GPUS["h100"], memory_gib=gib), count=ranks)
    load = rank_load(strategy, ranks, 840, None)
    largest = largest_micro_batch(COST, load, gpus)
    larger = [size for size in range(largest + 1, load.samples + 1) if load.samples % size == 0]
    assert not largest or fits(COST, replace(load, micro_batch_size=largest), gpus)
    assert not larger or not fits(COST, replace(load, micro_batch_size=larger[0]), gpus)


def test_time_is_work_over_rate_and_communication_hides_behind_it() -> None:
    gpus = cluster()
    computing, waiting = step_time(COST, rank_load("ddp", 8, 4096, 64), gpus)
    assert computing == pytest.approx(512 * 1e11 / (0.4 * 989e12))
    assert waiting == 0
    slow = cluster(gpu=replace(GPUS["h100"], link_gb=1))
    sent = 2 * 7 / 8 * 4 * 100e6 / (0.8 * 1e9)
    assert step_time(COST, rank_load("ddp", 8, 4096, 64), slow)[1] == pytest.approx(sent - 64 * 5e10 / gpus.flops)


def test_gpus_of_a_node_share_the_network_of_the_node() -> None:
    assert cluster().bus == 0.8 * 450e9
    assert cluster(count=16).bus == 0.8 * 400e9
    assert cluster(count=16, per_node=1).bus == 0.8 * 50e9


def test_command_prints_the_estimate_and_makes_no_folder(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["jepa-train"])
    with suppress(SystemExit):  # of status 0, or nothing would be printed
        assert main([*tiny, "estimate=true", "hardware.count=2", "hardware.gpu=a100", "strategy=fsdp"]) == 0
    output = capsys.readouterr().out
    for words in ("calculated, not measured: 2 x a100", "fsdp*", "largest micro_batch_size", "checkpoint", "samples/s"):
        assert words in output
    assert not list(tmp_path.iterdir())


def test_every_phase_is_printed(tiny: list[str]) -> None:
    phases = "phases=[{share:0.5},{share:0.5,image_size:64}]"
    text = estimate(compose([*tiny, "steps=10", phases, "hardware.count=1"]))
    assert text.count("5 in all") == 2
    assert "phase 2 of 2" in text
    assert "all phases" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["hardware.gpu=h10"], 'hardware.gpu=h10: no such gpu; did you mean "h100"?; valid: a100, a100_40, h100, '),
        (["hardware.count=0"], "hardware.count=0: must be at least 1"),
        (["hardware.per_node=0"], "hardware.per_node=0: must be at least 1"),
        (["hardware.utilisation=1.1"], "must be above 0 and at most 1"),
        (["hardware.utilisation=0"], "must be above 0 and at most 1"),
        (["estimate=true", "hardware.count=7"], "hardware.count=7 with batch_size=64 (train.yaml): equal shares need"),
    ],
)
def test_impossible_hardware_is_refused(overrides: list[str], expected: str) -> None:
    assert any(expected in fault for fault in Composer().check(overrides).errors)


def session(**changed: Any) -> Any:
    values = {"device": torch.device("cuda"), "bf16": False, "world_size": 1, "strategy": "single"}
    return SimpleNamespace(**(values | changed))


def test_advice_names_each_change_with_its_memory() -> None:
    config = compose(["batch_size=512", "encoder.depth=4"])
    advice = memory_advice(config, IMAGES, session(world_size=2, strategy="ddp"), 16 * GIB)
    for key in ("micro_batch_size=", "precision=bf16", "encoder.checkpoint_activations=true", "strategy=fsdp"):
        assert key in advice
    gib = [float(word.rstrip(")").split(" GiB")[0]) for word in advice.replace("(same result, ", "(").split("(")[1:]]
    before = float(advice.split("takes ")[1].split(" of")[0])
    assert len(gib) == 4
    assert max(gib) < before


def test_advice_names_no_change_that_was_made_already(tiny: list[str]) -> None:
    config = compose([*tiny, "micro_batch_size=1", "encoder.checkpoint_activations=true"])
    advice = memory_advice(config, IMAGES, session(bf16=True), 2**30)
    assert "a smaller encoder" in advice
    assert not any(key in advice for key in ("micro_batch_size", "precision", "checkpoint", "fsdp"))


def test_advice_has_no_numbers_where_the_model_cannot_be_traced(tiny: list[str]) -> None:
    config = replace(compose(tiny), encoder={"_target_": "torch.nn.Identity"})
    assert memory_advice(config, IMAGES, session(), 2**30).startswith("out of memory: try micro_batch_size=2, ")


def test_small_numbers_are_not_shown_as_zero() -> None:
    assert [seconds_text(s) for s in (0.0, 3e-6, 0.002, 1.5)] == ["0.00 s", "3 us", "2.0 ms", "1.50 s"]
    assert [size_text(size) for size in (0.0, 0.0004, 0.12, 2.0)] == ["0.00", "<0.001", "0.12", "2.00"]


@pytest.mark.parametrize("overrides", [[], ["objective=mae", "mask=random"], ["augment.views=2"]])
def test_the_refusal_of_the_default_size_promises_no_less_than_the_estimate(overrides: list[str]) -> None:
    config = compose([*overrides, "size=base"])
    views, width, depth = config.augment.views, config.encoder["embed_dim"], config.encoder["depth"]
    cluster = Cluster(gpu=GPUS["cpu"], count=2, per_node=2, utilisation=0.4, bf16=False)
    cost = model_cost(config, IMAGES, 1, bf16=False)
    counted = (cost.forward + cost.backward) / (cluster.flops * cluster.count)
    bound = most_seconds(12 * depth * width**2, 14 * 14, views, cluster)
    assert counted <= bound < 4 * counted
