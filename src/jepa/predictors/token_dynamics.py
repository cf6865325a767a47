"""Dynamics of frame tokens: a causal transformer over the codes of frames and the actions between them (IRIS)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa.layers.actions import ActionEncoder
from jepa.layers.causal import Cache, CausalTransformer
from jepa.layers.init import STD
from jepa.layers.two_hot import NUM_BINS, TwoHot
from jepa.types import Field

NO_END = -5.0
"""First logit of the end."""


class TokenPrediction(NamedTuple):
    codes: Tensor
    """float32 [B, T, K, num_codes]: logits of each code, given those before it; those of the first code are zero"""
    rewards: Tensor
    """float32 [B, T - 1, NUM_BINS]: logits of the reward of each transition, given its action; or [B, T - 1, 0]"""
    ends: Tensor
    """float32 [B, T - 1]: logit of the world's end in each transition; or [B, 0]"""


class NextFrame(NamedTuple):
    codes: Tensor
    """long [B, K]"""
    rewards: Tensor
    """float32 [B]: expected reward of the transition; 0 if rewards were not learnt"""
    ends: Tensor
    """float32 [B]: probability that the world ended with it"""


class TokenDynamics(nn.Module):
    """A sequence has the K codes of a frame and a slot for the action after it, then the next frame.

    A code is predicted from all codes and actions before it. Without actions the slot holds a learnt token. With
    `rewards` the output at an action's slot also predicts reward and end of the transition.
    """

    def __init__(
        self, *, num_codes: int, tokens_per_frame: int, num_frames: int, actions: Field | None, width: int, depth: int,
        num_heads: int, rewards: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens_per_frame, self.num_frames = tokens_per_frame, num_frames
        self.embed = nn.Embedding(num_codes, width)
        self.positions = nn.Parameter(torch.empty(num_frames, tokens_per_frame + 1, width))
        self.transformer = CausalTransformer(width=width, depth=depth, num_heads=num_heads)
        self.head = nn.Linear(width, num_codes)
        self.actions = ActionEncoder(field=actions, width=width) if actions else None
        self.end = None if actions else nn.Parameter(torch.zeros(width))
        self.outcome = nn.Linear(width, NUM_BINS + 1) if rewards else None
        self.scalars = TwoHot()
        nn.init.trunc_normal_(self.positions, std=STD)
        nn.init.trunc_normal_(self.embed.weight, std=STD)
        if self.outcome is not None:
            nn.init.zeros_(self.outcome.weight)  # no reward and no end is expected before one was seen
            nn.init.zeros_(self.outcome.bias)
            nn.init.constant_(self.outcome.bias[-1:], NO_END)

    def forward(self, codes: Tensor, actions: Tensor | None) -> TokenPrediction:
        """Codes [B, T, K], actions [B, T - 1, ...]"""
        sequence = self._slots(codes, actions).flatten(1, 2)
        hidden, _ = self.transformer(sequence[:, :-1])  # no action is known after the last frame
        logits = self.head(hidden)
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)  # slot s is predicted by slot s - 1
        logits = logits.unflatten(1, (codes.shape[1], -1))[:, :, :-1].float()
        return TokenPrediction(logits, *self.outcomes(hidden[:, self.tokens_per_frame :: self.tokens_per_frame + 1]))

    def outcomes(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs at the slots of actions [B, n, width] -> logits of their rewards and ends."""
        if self.outcome is None:
            return hidden.new_zeros(*hidden.shape[:2], 0), hidden.new_zeros(len(hidden), 0)
        logits = self.outcome(hidden).float()
        return logits[..., :-1], logits[..., -1]

    def _slots(self, codes: Tensor, actions: Tensor | None) -> Tensor:
        """-> [B, T, K + 1, width]; the slot of a missing last action has its position alone"""
        frames = self.embed(codes)
        between = self.between(actions, frames)
        slots = torch.cat([frames, between[:, :, None]], dim=2)
        return slots + self.positions[: codes.shape[1]]

    def between(self, actions: Tensor | None, frames: Tensor) -> Tensor:
        """What stands in the slots after the frames [B, T, K, width]: [B, T, width]"""
        if self.actions is None:
            assert self.end is not None
            return self.end.to(frames.dtype).expand(*frames.shape[:2], -1)
        assert actions is not None
        encoded = self.actions(actions).to(frames.dtype)
        return torch.cat([encoded, torch.zeros_like(frames[:, :1, 0])], dim=1)[:, : frames.shape[1]]

    def imagine(
        self, codes: Tensor, actions: Tensor | None, count: int, random: torch.Generator | None = None
    ) -> Tensor:
        """Codes of frames [B, h, K] and the actions from the first of them on [B, h - 1 + count, ...] -> [B, count, K].

        Codes are drawn with `random`, else the likeliest are taken.
        """
        known = codes.shape[1]
        past = None if actions is None else actions[:, : known - 1]
        imagination = Imagination(dynamics=self, codes=codes, actions=past, random=random)
        steps = range(known - 1, known - 1 + count)
        frames = [imagination.step(None if actions is None else actions[:, step]) for step in steps]
        return torch.stack([frame.codes for frame in frames], dim=1)


class Imagination:
    """Frames that follow from the codes of known ones [B, h, K] and the actions between those [B, h - 1, ...].

    Each step costs K + 1 positions of the transformer, since keys and values of those before are kept. It sees at most
    the last `num_frames` frames. Codes are drawn with `random`, else the likeliest are taken.
    """

    def __init__(
        self, *, dynamics: TokenDynamics, codes: Tensor, actions: Tensor | None, random: torch.Generator | None = None
    ) -> None:
        self.dynamics, self.frames, self.actions, self.random = dynamics, codes, actions, random
        self.cache: Cache | None = None
        self.position = 0
        """Of the last frame in the transformer's window."""

    @torch.no_grad()
    def step(self, action: Tensor | None) -> NextFrame:
        """The frame after the last one, by the action [B, ...] taken there."""
        model = self.dynamics
        if action is not None and self.actions is not None:
            self.actions = torch.cat([self.actions, action[:, None].to(self.actions.dtype)], dim=1)
        hidden = self._begin() if self.cache is None or self.position + 2 > model.num_frames else self._extend(action)
        rewards, ends = model.outcomes(hidden[:, -1:])
        codes = self._frame(hidden[:, -1:])
        self.frames = torch.cat([self.frames, codes[:, None]], dim=1)[:, -model.num_frames :]
        if self.actions is not None:
            self.actions = self.actions[:, -model.num_frames + 1 :]
        if model.outcome is None:
            return NextFrame(codes, codes.new_zeros(len(codes)).float(), codes.new_zeros(len(codes)).float())
        return NextFrame(codes, model.scalars.mean(rewards[:, 0]), ends[:, 0].sigmoid())

    def _begin(self) -> Tensor:
        """Read the last frames and the actions after each of them; -> outputs."""
        model = self.dynamics
        frames = self.frames[:, 1 - model.num_frames :]
        actions = None if self.actions is None else self.actions[:, -frames.shape[1] :]
        hidden, self.cache = model.transformer(model._slots(frames, actions).flatten(1, 2))
        self.position = frames.shape[1]
        return hidden

    def _extend(self, action: Tensor | None) -> Tensor:
        """Read the last code of the last frame and the action after it; -> outputs."""
        model = self.dynamics
        last = model.embed(self.frames[:, -1, -1:])
        between = model.between(None if action is None else action[:, None], last[:, :, None])
        tokens = torch.cat([last, between], dim=1) + model.positions[self.position, -2:]
        hidden, self.cache = model.transformer(tokens, self.cache)
        self.position += 1
        return hidden

    def _frame(self, hidden: Tensor) -> Tensor:
        """The codes [B, K] of the frame after the output [B, 1, width]; the last one is not in the cache yet."""
        model, chosen = self.dynamics, []
        for slot in range(model.tokens_per_frame):
            if slot:
                token = model.embed(chosen[-1]) + model.positions[self.position, slot - 1]
                hidden, self.cache = model.transformer(token[:, None], self.cache)
            logits = model.head(hidden[:, 0]).float()
            if self.random is None:
                chosen.append(logits.argmax(dim=-1))
            else:
                shares = logits.softmax(dim=-1).to(self.random.device)
                chosen.append(shares.multinomial(1, generator=self.random)[:, 0].to(logits.device))
        return torch.stack(chosen, dim=1)
