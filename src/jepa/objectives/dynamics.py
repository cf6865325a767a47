"""World model: predict the latent states that actions lead to (EB-JEPA, DINO-WM, V-JEPA 2-AC, LeWorldModel)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from jepa.layers.two_hot import NUM_BINS, TwoHot
from jepa.objectives.base import Objective, update_average
from jepa.predictors.action import ActionPredictor
from jepa.schedules import linear
from jepa.types import (
    Batch,
    Field,
    HeadName,
    Latents,
    LossOutput,
    Masks,
    NonNegative,
    PatchGrid,
    PositiveInt,
    Share,
    ShareBelowOne,
)


class Dynamics(Objective):
    """Encoder and predictor learn states of frames whose successors follow from the actions between them.

    The loss is the mean squared error of states predicted in 1 to num_frames - history steps, each from the prediction
    before it; the rollouts begin at every frame (`starts=all`) or at the first. Targets are the states of the encoder
    itself (`target=none`: a regulariser prevents the collapse; `stopgrad`: without gradient) or of an average of it
    (`ema`). `inverse_weight` adds the error of the action predicted from the history before it and the state after it
    (inverse dynamics, Pathak et al. 2017), or with `inverse_steps` K > 1 of the sum of the actions up to a state 1 to K
    steps later; `similarity_weight` adds the squared difference of consecutive states (EB-JEPA). `reward_weight` adds
    the cross-entropies of rewards and ends, read from the states that are predicted from the first frames, so that
    states hold what decides them. With `freeze` the encoder stays as it is, e.g. encoder=pretrained. After the training
    the `heads` are fitted on its frozen states for `head_steps` steps each (jepa.planning.heads), on `head_frames`
    frames at most; values and returns discount a step by `head_gamma`. The head `dynamics` is the predictor's own,
    learnt anew now that its targets no longer change.
    """

    predicts = "states"
    needs = {"actions"}
    uses = {"rewards", "terminated"}
    rules = ("jepa.objectives.rules.dynamics",)

    def __init__(
        self, *, encoder: nn.Module, predictor: nn.Module, regularizers: Mapping[str, nn.Module] | None = None,
        fields: Mapping[str, Field], target: Literal["none", "stopgrad", "ema"] = "none",
        starts: Literal["all", "first"] = "all", inverse_weight: NonNegative = 1.0,
        inverse_steps: PositiveInt = 1, reward_weight: NonNegative = 0.0, similarity_weight: NonNegative = 12.0,
        freeze: bool = False,
        momentum: Share = 0.99, final_momentum: Share = 1.0,
        heads: Sequence[HeadName] = ("probe", "value", "policy", "clone"), head_steps: PositiveInt = 4000,
        head_frames: PositiveInt = 100_000, head_gamma: ShareBelowOne = 0.97,
        total_steps: PositiveInt,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(predictor, ActionPredictor):
            raise ValueError(f"objective=dynamics needs predictor=action, got {type(predictor).__name__}")
        self.num_frames: int = fields["actions"].shape[0] + 1
        if self.num_frames <= predictor.history:
            raise ValueError(
                f"num_frames={self.num_frames}: a history of {predictor.history} frames needs one more to predict"
            )
        if inverse_steps > self.num_frames - predictor.history:
            raise ValueError(
                f"objective.inverse_steps={inverse_steps}: needs more frames than num_frames={self.num_frames}"
            )
        self.encoder = encoder.requires_grad_(not freeze)
        self.predictor = predictor
        self.regularizers = nn.ModuleDict(regularizers)
        self.target, self.starts, self.freeze = target, starts, freeze
        self.inverse_weight, self.inverse_steps = inverse_weight, inverse_steps
        self.reward_weight, self.similarity_weight = reward_weight, similarity_weight
        self.momentum, self.final_momentum, self.total_steps = momentum, final_momentum, total_steps
        self.heads, self.head_steps, self.head_frames, self.head_gamma = heads, head_steps, head_frames, head_gamma
        average = nn.ModuleDict({"encoder": encoder, "projector": predictor.projector})
        self.average: Any = deepcopy(average).requires_grad_(False).eval() if target == "ema" else None
        actions, sizes = predictor.actions, predictor.settings
        inputs, outputs = (predictor.history + 1) * predictor.state_dim, actions.block * actions.space.size
        self.inverse = Mlp(inputs, sizes["width"], outputs) if inverse_weight else None
        if reward_weight and not self.uses <= fields.keys():
            raise ValueError("objective.reward_weight: the data set has no rewards; leave it at 0")
        self.outcome = Mlp(predictor.state_size, sizes["width"], NUM_BINS + 1) if reward_weight else None
        self.scalars = TwoHot()

    @property
    def contract(self) -> dict[str, Any]:
        """The predictor's settings, and the actions that it knows."""
        actions = self.predictor.actions
        space = {
            "low": list(actions.space.low),
            "high": list(actions.space.high),
            "num_actions": actions.space.num_actions,
        }
        return {"predictor": self.predictor.settings, "block": actions.block, **space}

    def train(self, mode: bool = True) -> Dynamics:
        """Averaged and frozen modules stay in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        if self.freeze:
            self.encoder.eval()
        return self

    def states(self, clips: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] -> states of their frames [B, T, S, Z]."""
        return self.predictor.project(self.tokens(self.encoder, clips, learn=not self.freeze))

    def tokens(self, encoder: Any, clips: Tensor, *, learn: bool) -> Tensor:
        """[B, C, T, H, W] -> [B, T, N, D], each frame by itself"""
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            return encoder(clips).unflatten(1, (clips.shape[2], -1))

    def targets(self, states: Tensor, clips: Tensor) -> Tensor:
        """[B, T, S, Z], [B, C, T, H, W] -> [B, T, S, Z]"""
        if self.average is None:
            return states if self.target == "none" else states.detach()
        with torch.no_grad():
            tokens = self.tokens(self.average["encoder"], clips, learn=False)
            return self.predictor.norm(self.average["projector"](tokens).float())

    def forward(self, batch: Batch, masks: Masks, grad_cache: Any = None) -> LossOutput:
        """`grad_cache` replaces the regularisers if the batch is a micro-batch (training/gradient_cache.py)."""
        states, actions = self.states(batch.clips), batch.fields["actions"]
        targets = self.targets(states, batch.clips)
        errors, last = self.rollout_errors(states, targets, actions, self.starts)
        terms = {"prediction": torch.stack([error.mean() for error in errors]).mean()}
        loss = terms["prediction"]
        if self.inverse is not None:
            terms["inverse"] = self.inverse_error(states, actions)
            loss = loss + self.inverse_weight * terms["inverse"]
        if self.outcome is not None:
            terms["outcome"] = self.outcome_error(last, batch.fields)
            loss = loss + self.reward_weight * terms["outcome"]
        terms["similarity"] = (states[:, 1:] - states[:, :-1]).square().mean()
        loss = loss + self.similarity_weight * terms["similarity"]
        terms = {name: value.detach() for name, value in terms.items()}
        if self.regularizers:
            latents = self.latents(states, last)
            penalty, penalties = self.penalty(latents) if grad_cache is None else grad_cache(0, latents)
            loss, terms = loss + penalty, terms | penalties
        return LossOutput(loss, terms, states[:, 0].mean(dim=1).detach())

    def rollout_errors(
        self, states: Tensor, targets: Tensor, actions: Tensor, starts: str
    ) -> tuple[list[Tensor], Tensor]:
        """Squared errors after 1 ... K steps, [B, n] each, and the rollouts from the first frames, [B, K, S, Z].

        States and targets are [B, T, S, Z], actions [B, T - 1, A].
        """
        history, (batch, frames) = self.predictor.history, states.shape[:2]
        num_starts = frames - history if starts == "all" else 1
        windows = torch.stack([states[:, first : first + history] for first in range(num_starts)], dim=1)
        errors, first_predictions = [], []
        for horizon in range(1, frames - history + 1):
            count = min(num_starts, frames - history - horizon + 1)
            windows = windows[:, :count]  # [B, n, h, S, Z]
            past = [actions[:, first + horizon - 1 : first + horizon - 1 + history] for first in range(count)]
            following = self.predictor.step(windows.flatten(0, 1), torch.stack(past, dim=1).flatten(0, 1))
            following = following.unflatten(0, (batch, count))  # [B, n, S, Z]
            goal = targets[:, history + horizon - 1 : history + horizon - 1 + count]
            errors.append((following - goal).square().mean(dim=(2, 3)))
            windows = torch.cat([windows[:, :, 1:], following[:, :, None]], dim=2)
            first_predictions.append(following[:, 0])
        return errors, torch.stack(first_predictions, dim=1)

    def inverse_error(self, states: Tensor, actions: Tensor) -> Tensor:
        """Of the actions from a history to a later state, the mean over 1 to `inverse_steps` steps between them.

        A squared error of the sum of the actions, or the sum of their cross-entropies if actions are discrete. With
        several steps the later state is given as its change, in units of the usual change in a step: what stays as it
        is in an episode, as its walls do, would hide it.
        """
        assert self.inverse is not None
        history, pooled = self.predictor.history, states.mean(dim=2)
        scaled = self.predictor.actions.scale(actions[:, history - 1 :]).flatten(2)
        known, last = pooled.unfold(1, history, 1).mT.flatten(2), pooled[:, history - 1 :]  # [B, T - h + 1, h Z or Z]
        unit = (last[:, 1:] - last[:, :-1]).square().mean().sqrt().detach().clamp(min=1e-4)
        errors = []
        for steps in range(1, self.inverse_steps + 1):
            later = last[:, steps:] if self.inverse_steps == 1 else (last[:, steps:] - last[:, :-steps]) / unit
            predicted = self.inverse(torch.cat([known[:, :-steps], later], dim=-1)).float()
            errors.append(self._action_error(predicted, scaled.unfold(1, steps, 1).sum(dim=-1)))
        return torch.stack(errors).mean()

    def outcome_error(self, predicted: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropies of the rewards and ends of the transitions to the predicted states [B, K, S, Z]."""
        assert self.outcome is not None
        logits = self.outcome(predicted.flatten(2)).float()
        rewards, ends = (fields[name][:, -predicted.shape[1] :].float() for name in ("rewards", "terminated"))
        ended = F.binary_cross_entropy_with_logits(logits[..., -1], ends)
        return self.scalars.loss(logits[..., :-1], rewards).mean() + ended

    def _action_error(self, predicted: Tensor, actions: Tensor) -> Tensor:
        """[B, n, A], sums of scaled actions [B, n, A] -> scalar"""
        if not self.predictor.actions.space.is_discrete:
            return F.mse_loss(predicted, actions)
        choices = (*predicted.shape[:2], self.predictor.actions.block, -1)
        return -(actions.reshape(choices) * predicted.reshape(choices).log_softmax(dim=-1)).sum(dim=-1).mean()

    def latents(self, states: Tensor, predicted: Tensor) -> Latents:
        """States [B, T, S, Z] as tokens of a grid of T steps with S tokens; each frame is a sample of its own."""
        batch, frames, tokens = states.shape[:3]
        grid = PatchGrid(frames, 1, tokens)
        positions = torch.arange(grid.num_tokens, device=states.device).expand(batch, -1)
        targets = positions[:, -predicted.shape[1] * tokens :].unflatten(1, (-1, tokens))
        return Latents(states.flatten(1, 2), predicted, Masks(positions, targets), grid, 1, frames_apart=True)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """EMA update of the target encoder and projector, if there is one."""
        if self.average is None:
            return {}
        momentum = linear(step, self.total_steps, self.momentum, self.final_momentum)
        online = [*self.encoder.parameters(), *self.predictor.projector.parameters()]
        update_average(self.average.parameters(), online, momentum)
        return {"momentum": momentum}

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared errors of the rollout from the first frames, of copying the last of them and of the mean target.

        Each also by horizon, and the error with the actions of another sample: it is larger if actions matter.
        """
        training = self.training
        self.eval()
        states, actions = self.states(batch.clips), batch.fields["actions"]
        targets, history = self.targets(states, batch.clips), self.predictor.history
        errors = self.rollout_errors(states, targets, actions, "first")[0]
        shuffled = self.rollout_errors(states, targets, actions.roll(1, dims=0), "first")[0]
        self.train(training)
        future, last = targets[:, history:], states[:, history - 1 : history]
        copies, trivial = ((future - other).square().mean(dim=(0, 2, 3)) for other in (last, future.mean(dim=(0, 1))))
        rows = {
            "error": torch.cat(errors, dim=1).mean(dim=0), "shuffled_error": torch.cat(shuffled, dim=1).mean(dim=0),
            "copy_error": copies, "trivial_error": trivial,
        }  # fmt: skip
        metrics = {name: row.mean() for name, row in rows.items()}
        metrics["target_std"] = targets.flatten(0, 2).std(dim=0).mean()
        return metrics | {f"{name}_h{step + 1}": value for name, row in rows.items() for step, value in enumerate(row)}
