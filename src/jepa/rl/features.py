"""A frozen encoder as features extractor of Stable-Baselines3, `pip install 'jepa-train[rl]'`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jepa.encoders.pretrained import open_encoder
from jepa.exporters.format import require

spaces = require("gymnasium.spaces", "rl")
preprocessing = require("stable_baselines3.common.preprocessing", "rl")
torch_layers = require("stable_baselines3.common.torch_layers", "rl")


class FeaturesExtractor(torch_layers.BaseFeaturesExtractor):
    """Features of frames from a frozen encoder: the mean of its tokens, or with "flatten" one after the other.

    The mean hides where things are: PPO learned MiniGrid from all tokens, and hardly from their mean.
    `encoder` is any source of `jepa.load_encoder`, and is read again when a saved model is loaded. Frames are uint8
    [C, H, W] or [H, W, C] of any size, with as many channels as the encoder reads. For `policy_kwargs` of "CnnPolicy":
    `{"features_extractor_class": jepa.rl.FeaturesExtractor, "features_extractor_kwargs": {"encoder": "outputs/x"}}`.
    Raises ValueError for other observations.
    """

    def __init__(
        self, observation_space: Any, encoder: str | os.PathLike, pooling: Literal["mean", "flatten"] = "mean"
    ) -> None:
        if pooling not in ("mean", "flatten"):
            raise ValueError(f"FeaturesExtractor: pooling={pooling!r}; valid: mean, flatten")
        _check(observation_space)
        network: Any = open_encoder(encoder).requires_grad_(False)
        is_channels_first = preprocessing.is_image_space_channels_first(observation_space)
        frame = torch.zeros(1, *observation_space.shape)
        super().__init__(observation_space, _features(network, frame, is_channels_first, pooling).shape[1])
        self.encoder, self.is_channels_first, self.pooling = network, is_channels_first, pooling

    def forward(self, observations: Tensor) -> Tensor:
        """Frames in [0, 1], [B, C, H, W] or [B, H, W, C] -> features [B, D] or [B, N * D]"""
        return _features(self.encoder, observations, self.is_channels_first, self.pooling)

    def train(self, mode: bool = True) -> FeaturesExtractor:
        """The encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> FeaturesExtractor:
        """Policies of Stable-Baselines3 draw new weights for their extractor with this: the encoder keeps its own."""
        return self


def _check(space: Any) -> None:
    """Raises ValueError for observations that are no frames."""
    if isinstance(space, spaces.Dict):
        raise ValueError(
            f"FeaturesExtractor takes frames, and these observations are a dict of {', '.join(space)}: keep the frames "
            "alone by a wrapper, as minigrid.wrappers.ImgObsWrapper"
        )
    if not preprocessing.is_image_space(space):
        raise ValueError(f"FeaturesExtractor takes uint8 frames [C, H, W] or [H, W, C] from 0 to 255, not {space}")


@torch.no_grad()
def _features(encoder: Any, frames: Tensor, is_channels_first: bool, pooling: str) -> Tensor:
    """Frames in [0, 1], which policies make of uint8 ones -> [B, D] or [B, N * D]"""
    frames = frames if is_channels_first else frames.permute(0, 3, 1, 2)
    if frames.amax() > 1:
        raise ValueError("FeaturesExtractor takes frames in [0, 1]: leave out normalize_images=False")
    pixels = (255 * frames).round().to(torch.uint8)
    tokens = encoder(encoder.transform(pixels))  # [B, N, D]
    return tokens.mean(dim=1) if pooling == "mean" else tokens.flatten(1)
