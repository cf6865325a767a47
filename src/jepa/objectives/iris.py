"""IRIS (Micheli et al. 2023): frames as discrete tokens, and a transformer that predicts the tokens to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.layers.frame_tokenizer import FrameTokenizer, Tokenized, moving_weights
from jepa.objectives.base import Objective
from jepa.predictors.token_dynamics import TokenDynamics
from jepa.types import Batch, Field, LossOutput, Masks, NonNegative, PositiveInt, Share, Within


class IRIS(Objective):
    """Tokenizer and token dynamics on clips or stored episodes, trained together; actions are used if there are any.

    The tokenizer is an autoencoder through K discrete codes of each frame: the loss is the squared error of its pixels
    and `commitment` times the distance of the encoder's outputs from their codes. `motion` is the share of the pixels'
    weight that goes by how much they vary over time. The dynamics learn by the cross-entropy of each code, given those
    before it and the actions; no gradient of it reaches the tokenizer.
    """

    predicts = "tokens"
    uses = {"actions"}
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
        self.tokenizer = FrameTokenizer(
            encoder=encoder, quantizer=quantizer, num_codes=num_codes, code_dim=code_dim, levels=levels, merge=merge,
            decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads,
        )  # fmt: skip
        self.dynamics = TokenDynamics(
            num_codes=self.tokenizer.quantizer.num_codes, tokens_per_frame=self.tokenizer.tokens_per_frame,
            num_frames=self.encoder.clip_shape[1], actions=fields.get("actions"), width=dynamics_width,
            depth=dynamics_depth, num_heads=dynamics_num_heads,
        )  # fmt: skip
        self.commitment, self.motion = commitment, motion

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        tokenized = self.tokenizer(self.encoder(batch.clips))
        pixels = self.tokenizer.pixels(batch.clips)
        errors = (self.tokenizer.decode(tokenized.vectors) - pixels).square()
        reconstruction = (errors * moving_weights(pixels, self.motion)).mean()
        tokens = self.token_errors(tokenized, batch.fields.get("actions")).mean()
        loss = reconstruction + self.commitment * tokenized.commitment + tokens
        metrics = {
            "reconstruction": errors.mean().detach(), "commitment": tokenized.commitment.detach(),
            "tokens": tokens.detach(),
        }  # fmt: skip
        return LossOutput(loss, metrics, tokenized.embedding)

    def token_errors(self, tokenized: Tokenized, actions: Tensor | None) -> Tensor:
        """Cross-entropies in nats of all codes but the very first: [B, T K - 1]"""
        logits = self.dynamics(tokenized.codes, actions).flatten(1, 2)[:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), tokenized.codes.flatten(1)[:, 1:], reduction="none")

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
        of the entropy of the codes.
        """
        tokenized, pixels = self.tokenizer(self.encoder(batch.clips)), self.tokenizer.pixels(batch.clips)
        codes = tokenized.codes
        logits, following = self.dynamics(codes, batch.fields.get("actions"))[:, 1:], codes[:, 1:]
        error = F.cross_entropy(logits.flatten(0, 2), following.flatten())
        is_right = logits.argmax(dim=-1) == following
        shares = torch.bincount(following.flatten()).float() / following.numel()
        entropy = -torch.special.xlogy(shares, shares).sum()
        different = len(torch.unique(batch.clips.transpose(1, 2).flatten(0, 1), dim=0))
        return {
            "error": error, "trivial_error": entropy,
            "token_accuracy": is_right.float().mean(), "exact_frames": is_right.all(dim=-1).float().mean(),
            "copy_accuracy": (following == codes[:, :-1]).float().mean(),
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
