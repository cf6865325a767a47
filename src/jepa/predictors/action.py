"""Action-conditioned dynamics of latent states: the next state from the last states and actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from jepa.layers.actions import ActionEncoder
from jepa.layers.attention import SelfAttention
from jepa.layers.init import init_weights
from jepa.layers.transformer import check_sizes
from jepa.types import Field, PatchGrid, Positive, PositiveInt

MAX_FLAT = 2048
"""Largest number of features that the tokens of a frame are flattened to."""


class ActionPredictor(nn.Module):
    """States of a world and how actions change them.

    `state=pooled` turns the tokens of a frame into one vector of `state_dim` numbers by an MLP on all of them (S = 1,
    Z = state_dim); with `state=tokens` the normalised tokens themselves are the state (S = N, Z = D), as in DINO-WM
    (Zhou et al. 2025) and V-JEPA 2-AC (Assran et al. 2025). The next state is the last one plus the output of `model`
    on the states of `history` frames and the actions after each: a residual `mlp`, a `gru`, or a `transformer` whose
    blocks are modulated by the action (AdaLN, Peebles and Xie 2023).
    """

    predicts_tokens = False

    def __init__(
        self, *, grid: PatchGrid, embed_dim: int, fields: Mapping[str, Field],
        state: Literal["pooled", "tokens"] = "pooled", state_dim: PositiveInt = 64,
        model: Literal["mlp", "gru", "transformer"] = "mlp", history: PositiveInt = 1, width: PositiveInt = 256,
        depth: PositiveInt = 2, num_heads: PositiveInt = 4, mlp_ratio: Positive = 2.0, normalize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings = {
            "state": state, "state_dim": state_dim, "model": model, "history": history, "width": width, "depth": depth,
            "num_heads": num_heads, "mlp_ratio": mlp_ratio, "normalize": normalize,
        }  # fmt: skip
        num_tokens = grid.h * grid.w
        if state == "tokens" and model != "transformer":
            raise ValueError(
                f"predictor.model={model} has one vector as its state: use model=transformer or state=pooled"
            )
        self.history = history
        self.num_state_tokens, self.state_dim = (1, state_dim) if state == "pooled" else (num_tokens, embed_dim)
        if state == "pooled":
            self.projector = PooledState(num_tokens=num_tokens, embed_dim=embed_dim, width=width, state_dim=state_dim)
        else:
            self.projector = TokenState(embed_dim=embed_dim)
        self.normalize = normalize
        self.actions = ActionEncoder(field=fields["actions"], width=width)
        sizes = {
            "state_dim": self.state_dim,
            "width": width,
            "depth": depth,
            "history": history,
            "mlp_ratio": mlp_ratio,
        }
        if model == "transformer":
            self.dynamics = TransformerDynamics(num_state_tokens=self.num_state_tokens, num_heads=num_heads, **sizes)
        else:
            self.dynamics = {"mlp": MLPDynamics, "gru": GRUDynamics}[model](**sizes)

    @property
    def state_size(self) -> int:
        """Numbers of a state."""
        return self.num_state_tokens * self.state_dim

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens of frames [B, T, N, D] -> states [B, T, S, Z], in float32."""
        return self.norm(self.projector(tokens).float())

    def norm(self, states: Tensor) -> Tensor:
        """With `normalize` each state vector has mean 0 and variance 1."""
        return F.layer_norm(states, states.shape[-1:]) if self.normalize else states

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        """The last `history` states [B, h, S, Z], and the action after each [B, h, A] -> the next state [B, S, Z]."""
        return self.advance(states, self.actions(actions))

    def advance(self, states: Tensor, codes: Tensor) -> Tensor:
        """As `step`, with encoded actions [B, h, W]."""
        return self.norm(states[:, -1] + self.dynamics(states, codes).float())

    def rollout(self, states: Tensor, actions: Tensor) -> Tensor:
        """States [B, h, S, Z], actions between and after them [B, h - 1 + K, A] -> the next states [B, K, S, Z]."""
        predicted = []
        for first in range(actions.shape[1] - self.history + 1):
            following = self.step(states, actions[:, first : first + self.history])
            states = torch.cat([states[:, 1:], following[:, None]], dim=1)
            predicted.append(following)
        return torch.stack(predicted, dim=1)


class PooledState(nn.Module):
    """[B, T, N, D] -> [B, T, 1, state_dim]: an MLP on all tokens, so that it knows where something is."""

    def __init__(self, *, num_tokens: int, embed_dim: int, width: int, state_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(embed_dim, max(1, min(embed_dim, MAX_FLAT // num_tokens)))
        flat = num_tokens * self.reduce.out_features
        self.mlp = nn.Sequential(nn.LayerNorm(flat), Mlp(flat, width, state_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.reduce(tokens).flatten(2))[:, :, None]


class TokenState(nn.Module):
    """[B, T, N, D] -> [B, T, N, D], normalised"""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)


class MLPDynamics(nn.Module):
    """States [B, h, 1, Z] and encoded actions [B, h, W] -> change of the last state [B, 1, Z]."""

    def __init__(self, *, state_dim: int, width: int, depth: int, history: int, mlp_ratio: float) -> None:
        super().__init__()
        self.embed = nn.Linear(history * (state_dim + width), width)
        hidden = round(mlp_ratio * width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Mlp(width, hidden)) for _ in range(depth))
        self.head = nn.Linear(width, state_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        hidden = self.embed(torch.cat([states.flatten(1), actions.flatten(1)], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)[:, None]


class GRUDynamics(nn.Module):
    """As MLPDynamics; a GRU reads the frames of the history one after the other."""

    def __init__(self, *, state_dim: int, width: int, depth: int, history: int, mlp_ratio: float) -> None:
        super().__init__()
        self.gru = nn.GRU(state_dim + width, width, num_layers=depth, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), Mlp(width, round(mlp_ratio * width), state_dim))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        hidden, _ = self.gru(torch.cat([states.flatten(2), actions], dim=2))
        return self.head(hidden[:, -1])[:, None]


class TransformerDynamics(nn.Module):
    """States [B, h, S, Z] and encoded actions [B, h, W] -> change of the last state [B, S, Z].

    Tokens attend to those of their own and of earlier frames.
    """

    mask: Tensor

    def __init__(
        self, *, num_state_tokens: int, state_dim: int, width: int, depth: int, num_heads: int, history: int,
        mlp_ratio: float,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(width, num_heads, mlp_ratio, width_key="predictor.width", heads_key="predictor.num_heads")
        self.embed = nn.Linear(state_dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(history, num_state_tokens, width))
        self.blocks = nn.ModuleList(
            ModulatedBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, state_dim))
        init_weights(self, self.blocks)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)  # pyright: ignore
        frame = torch.arange(history).repeat_interleave(num_state_tokens)
        self.register_buffer("mask", frame[:, None] >= frame, persistent=False)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        num_tokens = states.shape[2]
        tokens = (self.embed(states) + self.positions).flatten(1, 2)  # [B, h S, W]
        conditions = actions.repeat_interleave(num_tokens, dim=1)
        for block in self.blocks:
            tokens = block(tokens, conditions, self.mask)
        return self.head(tokens[:, -num_tokens:])


class ModulatedBlock(nn.Module):
    """A transformer block with inputs scaled and shifted, and outputs gated, by a condition."""

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = SelfAttention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, round(mlp_ratio * width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: Tensor, conditions: Tensor, mask: Tensor) -> Tensor:
        """[B, n, W], [B, n, W], bool [n, n] -> [B, n, W]"""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(conditions)).chunk(6, dim=-1)
        attended = self.attn(self.norm1(tokens) * (1 + scale1) + shift1, attn_mask=mask)
        tokens = tokens + (1 + gate1) * attended
        return tokens + (1 + gate2) * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)
