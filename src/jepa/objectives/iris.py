"""IRIS (Micheli et al. 2023): frames as discrete tokens, and a transformer that predicts the tokens to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.layers.frame_tokenizer import FrameTokenizer, moving_weights
from jepa.objectives.base import Objective
from jepa.predictors.token_dynamics import TokenDynamics
from jepa.types import Batch, Field, LossOutput, Masks, NonNegative, PositiveInt, Share, Within


class IRIS(Objective):
    """Tokenizer and token dynamics on clips or stored episodes, trained together; actions are used if there are any.

    The tokenizer is an autoencoder through K discrete codes of each frame: the loss is the squared error of its pixels
    and `commitment` times the distance of the encoder's outputs from their codes. `motion` is the share of the pixels'
    weight that goes by how much they vary over time. The dynamics learn by the cross-entropy of each code, given those
    before it and the actions, and of rewards and ends if there are any; no gradient of it reaches the tokenizer.
    """

    predicts = "tokens"
    uses = {"actions", "rewards", "terminated", "valid"}
    rules = ("jepa.objectives.rules.iris",)

    def __init__(
        self, *, encoder: nn.Module, fields: Mapping[str, Field], quantizer: Literal["vq", "fsq"] = "vq",
        num_codes: Annotated[int, Within(2)] = 512, code_dim: PositiveInt = 32,
        levels: Sequence[Annotated[int, Within(3)]] = (8, 8, 8), merge: PositiveInt = 1,
        commitment: NonNegative = 0.25, motion: Share = 0.5, dynamics_width: PositiveInt = 256,
        dynamics_depth: PositiveInt = 4, dynamics_num_heads: PositiveInt = 4,
        decoder_width: PositiveInt | None = None, decoder_depth: PositiveInt = 4,
        decoder_num_heads: PositiveInt | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder: Any = encoder
        tokenizer = {
            "quantizer": quantizer, "num_codes": num_codes, "code_dim": code_dim, "levels": levels, "merge": merge,
            "decoder_width": decoder_width, "decoder_depth": decoder_depth, "decoder_num_heads": decoder_num_heads,
        }  # fmt: skip
        dynamics = {"width": dynamics_width, "depth": dynamics_depth, "num_heads": dynamics_num_heads}
        self.settings = {**tokenizer, **{f"dynamics_{name}": value for name, value in dynamics.items()}}
        self.tokenizer = FrameTokenizer(encoder=encoder, **tokenizer)
        self.dynamics = TokenDynamics(
            num_codes=self.tokenizer.quantizer.num_codes, tokens_per_frame=self.tokenizer.tokens_per_frame,
            num_frames=self.encoder.clip_shape[1], actions=fields.get("actions"), rewards="rewards" in fields,
            **dynamics,
        )  # fmt: skip
        self.commitment, self.motion = commitment, motion

    @property
    def contract(self) -> dict[str, Any]:
        """The settings, and the actions that the dynamics know; empty if they know none."""
        if (actions := self.dynamics.actions) is None:
            return {}
        names = ("low", "high", "num_actions")
        space = {
            name: list(value) if isinstance(value := getattr(actions.space, name), tuple) else value for name in names
        }
        return {"tokens": self.settings, "num_frames": self.dynamics.num_frames, "block": actions.block, **space}

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        tokenized = self.tokenizer(self.encoder(batch.clips))
        pixels = self.tokenizer.pixels(batch.clips)
        errors = (self.tokenizer.decode(tokenized.vectors) - pixels).square()
        reconstruction = (errors * moving_weights(pixels, self.motion)).mean()
        terms = self.dynamics_errors(tokenized.codes, batch.fields)
        loss = reconstruction + self.commitment * tokenized.commitment + torch.stack([*terms.values()]).sum()
        metrics = {"reconstruction": errors.mean(), "commitment": tokenized.commitment, **terms}
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()}, tokenized.embedding)

    def dynamics_errors(self, codes: Tensor, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies in nats of the codes but the very first, of rewards and of ends.

        Means over all positions, zero beyond the end of an episode: so they are the same for any number of ranks.
        """
        predicted, took_place = self.dynamics(codes, fields.get("actions")), real_transitions(codes, fields)
        is_real = F.pad(took_place, (1, 0), value=1.0).repeat_interleave(codes.shape[2], dim=1)[:, 1:]
        logits = predicted.codes.flatten(1, 2)[:, 1:].transpose(1, 2)
        tokens = F.cross_entropy(logits, codes.flatten(1)[:, 1:], reduction="none")
        terms = {"tokens": (tokens * is_real).mean()}
        if self.dynamics.outcome is not None:
            rewards = self.dynamics.scalars.loss(predicted.rewards, fields["rewards"])
            ends = F.binary_cross_entropy_with_logits(predicted.ends, fields["terminated"].float(), reduction="none")
            terms |= {"rewards": (rewards * took_place).mean(), "ends": (ends * took_place).mean()}
        return terms

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """The codebook follows what it encodes."""
        self.tokenizer.quantizer.after_step(step)
        return {}

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Cross-entropy of the codes of all frames after the first, and that of their frequencies in the batch.

        `token_accuracy` and `exact_frames` are shares of the likeliest codes, and of frames with all of them, that are
        right, `copy_accuracy` is the share of codes that stay from frame to frame. `distinct` is the number of
        different token frames over that of different frames: below 1, frames were confused. `codes` is the exponential
        of the entropy of the codes. Frames beyond the end of an episode are left out.
        """
        tokenized, pixels = self.tokenizer(self.encoder(batch.clips)), self.tokenizer.pixels(batch.clips)
        codes = tokenized.codes
        is_real = real_transitions(codes, batch.fields) > 0
        logits, following = (
            self.dynamics(codes, batch.fields.get("actions")).codes[:, 1:][is_real],
            codes[:, 1:][is_real],
        )
        error = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        is_right = logits.argmax(dim=-1) == following
        shares = torch.bincount(following.flatten()).float() / following.numel()
        entropy = -torch.special.xlogy(shares, shares).sum()
        different = len(torch.unique(batch.clips.transpose(1, 2).flatten(0, 1), dim=0))
        return {
            "error": error, "trivial_error": entropy,
            "token_accuracy": is_right.float().mean(), "exact_frames": is_right.all(dim=-1).float().mean(),
            "copy_accuracy": (following == codes[:, :-1][is_real]).float().mean(),
            "distinct": torch.tensor(len(torch.unique(codes.flatten(0, 1), dim=0)) / different),
            "codes": entropy.exp(),
            "reconstruction_error": (self.tokenizer.decode(tokenized.vectors) - pixels).square().mean(),
        }  # fmt: skip

    @torch.no_grad()
    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Reconstructions, and clips whose frames after the first two are imagined."""
        tokenized = self.tokenizer(self.encoder(batch.clips))
        known = min(2, batch.clips.shape[2] - 1)
        count = batch.clips.shape[2] - known
        imagined = self.dynamics.imagine(tokenized.codes[:, :known], batch.fields.get("actions"), count)
        vectors = torch.cat([tokenized.vectors[:, :known], self.tokenizer.quantizer.lookup(imagined)], dim=1)
        clips = {"reconstruction": tokenized.vectors, "imagined": vectors}
        return {name: self.tokenizer.to_clips(self.tokenizer.decode(values)) for name, values in clips.items()}


def real_transitions(codes: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Codes [B, T, K] -> float32 [B, T - 1]: 0 for transitions beyond the end of an episode"""
    valid = fields.get("valid")
    return torch.ones_like(codes[:, 1:, 0], dtype=torch.float32) if valid is None else valid
