"""Dynamics of frame tokens: a causal transformer over the codes of frames and the actions between them (IRIS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa.layers.actions import ActionEncoder
from jepa.layers.causal import Cache, CausalTransformer
from jepa.layers.init import STD
from jepa.types import Field


class TokenDynamics(nn.Module):
    """A sequence has the K codes of a frame and a slot for the action after it, then the next frame.

    A code is predicted from all codes and actions before it. Without actions the slot holds a learnt token.
    """

    def __init__(
        self, *, num_codes: int, tokens_per_frame: int, num_frames: int, actions: Field | None, width: int, depth: int,
        num_heads: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens_per_frame, self.num_frames = tokens_per_frame, num_frames
        self.embed = nn.Embedding(num_codes, width)
        self.positions = nn.Parameter(torch.empty(num_frames, tokens_per_frame + 1, width))
        self.transformer = CausalTransformer(width=width, depth=depth, num_heads=num_heads)
        self.head = nn.Linear(width, num_codes)
        self.actions = ActionEncoder(field=actions, width=width) if actions else None
        self.end = None if actions else nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.positions, std=STD)
        nn.init.trunc_normal_(self.embed.weight, std=STD)

    def forward(self, codes: Tensor, actions: Tensor | None) -> Tensor:
        """Codes [B, T, K], actions [B, T - 1, ...] -> logits [B, T, K, num_codes]; those of the first code are zero."""
        sequence = self._slots(codes, actions).flatten(1, 2)
        hidden, _ = self.transformer(sequence[:, :-1])  # no action is known after the last frame
        logits = self.head(hidden)
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)  # slot s is predicted by slot s - 1
        return logits.unflatten(1, (codes.shape[1], -1))[:, :, :-1].float()

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

    @torch.no_grad()
    def imagine(
        self, codes: Tensor, actions: Tensor | None, count: int, random: torch.Generator | None = None
    ) -> Tensor:
        """Codes of frames [B, h, K] and the actions from the first of them on [B, h - 1 + count, ...] -> [B, count, K].

        Codes are drawn with `random`, else the likeliest are taken. The transformer sees at most `num_frames` frames.
        """
        known, cache, position, frames = codes.shape[1], None, 0, codes
        for number in range(known, known + count):
            if cache is None or position + 1 >= self.num_frames:
                kept = frames[:, -min(frames.shape[1], self.num_frames - 1) :]
                start = number - kept.shape[1]
                sequence = self._slots(kept, None if actions is None else actions[:, start:number])
                hidden, cache = self.transformer(sequence.flatten(1, 2))
                position = kept.shape[1]  # of the frame that is imagined
            else:
                after = None if actions is None else actions[:, number - 1 : number]
                hidden, cache = self.transformer(self._after(frames[:, -1, -1], after, position), cache)
                position += 1
            frame, cache = self._frame(hidden[:, -1:], cache, position, random)
            frames = torch.cat([frames, frame[:, None]], dim=1)
        return frames[:, known:]

    def _after(self, code: Tensor, action: Tensor | None, position: int) -> Tensor:
        """The last code [B] of the frame at `position` and the action after it -> [B, 2, width]"""
        last = self.embed(code)[:, None]
        between = self.between(action, last[:, :, None])
        return torch.cat([last, between], dim=1) + self.positions[position, -2:]

    def _frame(
        self, hidden: Tensor, cache: Cache, position: int, random: torch.Generator | None
    ) -> tuple[Tensor, Cache]:
        """The codes [B, K] of the frame after the output [B, 1, width]; the last one is not in the cache yet."""
        chosen = []
        for slot in range(self.tokens_per_frame):
            if slot:
                token = self.embed(chosen[-1]) + self.positions[position, slot - 1]
                hidden, cache = self.transformer(token[:, None], cache)
            logits = self.head(hidden[:, 0]).float()
            if random is None:
                chosen.append(logits.argmax(dim=-1))
            else:
                chosen.append(logits.softmax(dim=-1).multinomial(1, generator=random)[:, 0])
        return torch.stack(chosen, dim=1), cache
