"""IRIS: what its dynamics may see, what they imagine, where gradients go, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checked import checked

from jepa.encoders.spatial import SpatialEncoder
from jepa.layers.frame_tokenizer import moving_weights
from jepa.objectives.iris import IRIS
from jepa.predictors.token_dynamics import Imagination
from jepa.types import ActionSpace, Batch, Field, Masks

B, T, SIDE = 4, 4, 16
DISCRETE = Field(shape=(T - 1,), dtype="int64", space=ActionSpace(num_actions=3))
CONTINUOUS = Field(shape=(T - 1, 2), space=ActionSpace(low=(-1.0, -2.0), high=(1.0, 2.0)))
NONE = Masks(torch.zeros(B, 0, dtype=torch.long), torch.zeros(B, 0, 0, dtype=torch.long))


REWARDS = {name: Field(shape=(T - 1,)) for name in ("rewards", "terminated", "valid")}


def iris(actions: Field | None = DISCRETE, rewards: bool = False, **changes: Any) -> IRIS:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(1, T, SIDE, SIDE), patch_size=4, embed_dim=16, depth=1, num_heads=2)
    sizes = {"merge": 2, "decoder_depth": 1, "num_codes": 20, "code_dim": 4}
    sizes |= {"dynamics_width": 16, "dynamics_depth": 1, "dynamics_num_heads": 2}
    fields = ({"actions": actions} if actions else {}) | (REWARDS if rewards else {})
    return checked(IRIS, encoder=encoder, fields=fields, **{**sizes, **changes})


def batch(actions: Field | None = DISCRETE, count: int = B) -> Batch:
    generator = torch.Generator().manual_seed(1)
    fields = {"labels": torch.zeros(count, dtype=torch.long)}
    if actions is DISCRETE:
        fields["actions"] = torch.randint(3, (count, T - 1), generator=generator)
    elif actions is CONTINUOUS:
        fields["actions"] = torch.rand(count, T - 1, 2, generator=generator)
    return Batch(torch.randn(count, 1, T, SIDE, SIDE, generator=generator), fields)


def codes_of(model: IRIS, clips: torch.Tensor) -> torch.Tensor:
    return model.tokenizer(model.encoder(clips)).codes


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS, None], ids=["discrete", "continuous", "none"])
def test_every_parameter_learns(quantizer: str, actions: Field | None) -> None:
    model = iris(actions, quantizer=quantizer)
    model(batch(actions), NONE).loss.backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]


def test_the_encoder_learns_from_pixels_alone() -> None:
    model = iris()
    tokenized = model.tokenizer(model.encoder(batch().clips))
    torch.stack([*model.dynamics_errors(tokenized.codes, batch().fields).values()]).sum().backward()
    assert all(value.grad is None for value in (*model.encoder.parameters(), *model.tokenizer.parameters()))


@pytest.mark.parametrize("frame", range(T))
@pytest.mark.parametrize("slot", [0, 3])
def test_no_code_is_predicted_from_itself_or_a_later_one(frame: int, slot: int) -> None:
    model, before, actions = iris(), codes_of(iris(), batch().clips), batch().fields["actions"]
    after = before.clone()
    after[:, frame, slot] = (after[:, frame, slot] + 1) % 20
    with torch.no_grad():
        differs = (model.dynamics(before, actions).codes - model.dynamics(after, actions).codes).abs().amax(
            dim=(0, 3)
        ) > 1e-7
    position = frame * 4 + slot
    assert differs.flatten().tolist() == [place > position for place in range(4 * T)]


@pytest.mark.parametrize("step", range(T - 1))
def test_an_action_changes_the_frames_after_it_alone(step: int) -> None:
    model, codes, actions = iris(), codes_of(iris(), batch().clips), batch().fields["actions"]
    others = actions.clone()
    others[:, step] = (others[:, step] + 1) % 3
    with torch.no_grad():
        logits, changed = (model.dynamics(codes, moves).codes for moves in (actions, others))
    differs = (logits - changed).abs().amax(dim=(0, 2, 3)) > 1e-7
    assert differs.tolist() == [frame > step for frame in range(T)]


@pytest.mark.parametrize("actions", [DISCRETE, None], ids=["actions", "none"])
@pytest.mark.parametrize("known", [1, 2, 3])
def test_imagined_frames_are_the_likeliest_of_full_passes(actions: Field | None, known: int) -> None:
    model, its_batch = iris(actions), batch(actions)
    codes, moves = codes_of(model, its_batch.clips), its_batch.fields.get("actions")
    frames = codes[:, :known]
    with torch.no_grad():
        for number in range(known, T):
            frames = torch.cat([frames, torch.zeros_like(frames[:, :1])], dim=1)
            for slot in range(4):
                logits = model.dynamics(frames, None if moves is None else moves[:, :number]).codes
                frames[:, number, slot] = logits[:, number, slot].argmax(dim=-1)
    assert torch.equal(model.dynamics.imagine(codes[:, :known], moves, T - known), frames[:, known:])


def test_a_dream_is_longer_than_the_clips_that_were_learnt() -> None:
    model, codes = iris(None), codes_of(iris(None), batch(None).clips)
    dream = model.dynamics.imagine(codes, None, 6, torch.Generator().manual_seed(0))
    assert dream.shape == (B, 6, 4)
    last = torch.cat([codes, dream[:, :-1]], dim=1)[:, -(T - 1) :]
    assert torch.equal(
        model.dynamics.imagine(last, None, 1), model.dynamics.imagine(torch.cat([codes, dream[:, :-1]], dim=1), None, 1)
    )


def rewarding(model: IRIS) -> IRIS:
    """With outcomes that depend on what is seen, which are zero at first."""
    assert model.dynamics.outcome is not None
    torch.nn.init.normal_(model.dynamics.outcome.weight, generator=torch.Generator().manual_seed(3))
    return model


def outcomes(count: int = B) -> dict[str, torch.Tensor]:
    rewards, ends = torch.zeros(2, count, T - 1)
    rewards[0, 1], ends[0, 1] = 0.9, 1.0
    return {"rewards": rewards, "terminated": ends, "valid": torch.ones(count, T - 1)}


@pytest.mark.parametrize("step", range(T - 1))
def test_outcomes_see_the_action_of_their_transition_and_nothing_later(step: int) -> None:
    model, codes, actions = rewarding(iris(rewards=True)), codes_of(iris(), batch().clips), batch().fields["actions"]
    others, later = actions.clone(), codes.clone()
    others[:, step] = (others[:, step] + 1) % 3
    later[:, step + 1 :] = (later[:, step + 1 :] + 1) % 20
    with torch.no_grad():
        first, acted, seen = (model.dynamics(*pair) for pair in ((codes, actions), (codes, others), (later, actions)))
    for one, two in ((first.ends, acted.ends), (first.rewards.mean(-1), acted.rewards.mean(-1))):
        assert ((one - two).abs().amax(dim=0) > 1e-7).tolist() == [position >= step for position in range(T - 1)]
    assert torch.allclose(first.ends[:, : step + 1], seen.ends[:, : step + 1], atol=1e-6)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_imagined_outcomes_are_those_of_full_passes(known: int) -> None:
    model, codes, actions = rewarding(iris(rewards=True)), codes_of(iris(), batch().clips), batch().fields["actions"]
    dream = Imagination(dynamics=model.dynamics, codes=codes[:, :known], actions=actions[:, : known - 1])
    frames = [dream.step(actions[:, step]) for step in range(known - 1, T - 1)]
    with torch.no_grad():
        whole = model.dynamics(torch.cat([codes[:, :known], *(frame.codes[:, None] for frame in frames)], 1), actions)
    ends = torch.stack([frame.ends for frame in frames], dim=1)
    rewards = torch.stack([frame.rewards for frame in frames], dim=1)
    assert torch.allclose(ends, whole.ends[:, known - 1 :].sigmoid(), atol=1e-5)
    assert torch.allclose(rewards, model.dynamics.scalars.mean(whole.rewards[:, known - 1 :]), rtol=1e-4, atol=1e-3)


def test_frames_beyond_an_end_are_not_learnt() -> None:
    model, its_batch = rewarding(iris(rewards=True)), batch()
    codes, fields = codes_of(model, its_batch.clips), its_batch.fields | outcomes()
    fields["valid"][0, 2:] = 0
    errors = model.dynamics_errors(codes, fields)
    codes[0, 3] = (codes[0, 3] + 5) % 20
    fields["rewards"][0, 2], fields["terminated"][0, 2] = 7.0, 1.0
    assert model.dynamics_errors(codes, fields) == errors
    fields["valid"][0, 2] = 1
    assert all(model.dynamics_errors(codes, fields)[name] != value for name, value in errors.items())


def test_what_moves_weighs_more() -> None:
    pixels = torch.zeros(2, 3, 4, 5)
    pixels[0, 1, 2, 3] = 6.0
    weights = moving_weights(pixels, 0.5)
    assert weights[0, 0].argmax() == 2 * 5 + 3
    assert weights[0].mean().item() == pytest.approx(1, abs=0.01)
    assert weights[1].unique().tolist() == [0.5]
    assert torch.equal(moving_weights(pixels, 0.0), torch.ones(2, 1, 4, 5))


def test_confused_frames_are_counted() -> None:
    model, its_batch = iris().eval(), batch()
    model.tokenizer.quantizer.codebook.fill_(0.0)  # pyright: ignore
    metrics = model.diagnose(its_batch, NONE)
    assert metrics["distinct"].item() == pytest.approx(1 / (B * T))
    assert metrics["copy_accuracy"].item() == metrics["codes"].item() == 1


def test_pictures_are_of_the_clips_size_and_begin_with_true_frames() -> None:
    model, its_batch = iris().eval(), batch()
    pictures = model.pictures(its_batch, NONE)
    assert {name: tuple(clips.shape) for name, clips in pictures.items()} == {
        "reconstruction": (B, 1, T, SIDE, SIDE), "imagined": (B, 1, T, SIDE, SIDE)
    }  # fmt: skip
    assert torch.equal(pictures["reconstruction"][:, :, :2], pictures["imagined"][:, :, :2])


def test_squares_that_do_not_fill_a_frame_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.merge=3 does not divide the 4 x 4 patches"):
        iris(merge=3)
