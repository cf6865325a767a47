"""Colour augmentation of batches, drawn for each row and shared by all frames of a clip (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_DRAWS = 9
"""Number of uniform random numbers for each row, for jitter, grayscale, blur and solarisation."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the brightness."""
JITTER_RATIO = 0.8
"""Share of the rows that are jittered."""
BLUR_SIGMA = (0.1, 2.0)
"""Bounds of the standard deviation of the blur, in pixels."""


class Colour:
    """float [R, C, T, H, W] of 0 to 255, uniform [R, NUM_DRAWS] -> [R, C, T, H, W]: colours of SimCLR and LeJEPA.

    `jitter` changes brightness, contrast and saturation by factors of up to 1 +- 0.4 jitter, then the hue by up to 0.1
    jitter turns; 1 is the strength of BYOL and of SimCLR on CIFAR-10, 2 that of SimCLR on ImageNet. The order is fixed,
    torchvision's is random. `grayscale`, `blur` and `solarize` are the shares of rows that become grey, are blurred
    with a Gaussian, or are inverted above half of the brightness. Saturation and hue need three channels.
    """

    def __init__(self, *, channels: int, jitter: float, grayscale: float, blur: float, solarize: float) -> None:
        if grayscale and channels != 3:
            raise ValueError(f"augment.grayscale={grayscale}: pictures of {channels} channels have no colour")
        self.jitter = jitter
        self.grayscale = grayscale
        self.blur = blur
        self.solarize = solarize
        self.num_draws = NUM_DRAWS if max(jitter, grayscale, blur, solarize) > 0 else 0

    def __call__(self, clips: Tensor, uniform: Tensor) -> Tensor:
        columns = uniform[..., None, None, None, None].unbind(1)  # [R, 1, 1, 1, 1] each
        jittered, *changes, grey, blurred, width, solarised = columns
        if self.jitter:
            strengths = (0.4, 0.4, 0.4, 0.1)
            steps = [
                (2 * change - 1) * strength * self.jitter * (jittered < JITTER_RATIO)
                for change, strength in zip(changes, strengths, strict=True)
            ]
            clips = jitter(clips, brightness=1 + steps[0], contrast=1 + steps[1], saturation=1 + steps[2], hue=steps[3])
        if self.grayscale:
            clips = torch.where(grey < self.grayscale, luma(clips), clips)
        if self.blur:
            sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * width
            clips = blur(clips, torch.where(blurred < self.blur, sigma, 0).flatten())
        if self.solarize:
            clips = torch.where((solarised < self.solarize) & (clips >= 128), 255 - clips, clips)
        return clips


def jitter(clips: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """[R, C, T, H, W] of 0 to 255, three factors and a hue in turns [R, 1, 1, 1, 1] each -> [R, C, T, H, W]"""
    clips = (clips * brightness).clamp_(0, 255)
    clips = luma(clips).mean(dim=(1, 2, 3, 4), keepdim=True).lerp(clips, contrast).clamp_(0, 255)
    if clips.shape[1] != 3:
        return clips
    clips = luma(clips).lerp(clips, saturation).clamp_(0, 255)
    return rotate_hue(clips, hue)


def luma(clips: Tensor) -> Tensor:
    """[R, C, T, H, W] -> [R, 1, T, H, W]: the brightness of RGB, the mean for other numbers of channels."""
    if clips.shape[1] != 3:
        return clips.mean(dim=1, keepdim=True)
    red, green, blue = clips.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def rotate_hue(clips: Tensor, turns: Tensor) -> Tensor:
    """[R, 3, T, H, W], [R, 1, 1, 1, 1] -> [R, 3, T, H, W]: the hue of HSV rotated by a number of turns.

    A colour is max - chroma * clamp(min(k, 4 - k), 0, 1) with k = hue + 5, 3 and 1 for red, green and blue, modulo 6.
    """
    red, green, blue = clips.split(1, dim=1)  # [R, 1, T, H, W] each
    highest, lowest = clips.amax(dim=1, keepdim=True), clips.amin(dim=1, keepdim=True)
    chroma = highest - lowest
    per_chroma = 1 / chroma.clamp(min=1e-6)
    hue = torch.where(highest == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma)
    hue = torch.where(highest == red, (green - blue) * per_chroma, hue) + 6 * turns
    phase = (hue + torch.tensor([5.0, 3.0, 1.0], device=clips.device).view(3, 1, 1, 1)).remainder_(6)
    return highest - chroma * torch.minimum(phase, 4 - phase).clamp_(0, 1)


def blur(clips: Tensor, sigma: Tensor) -> Tensor:
    """[R, C, T, H, W], [R] -> [R, C, T, H, W]: Gaussian with `sigma` pixels, renormalised at the edges."""
    rows, columns = (_gaussian(sigma, side) for side in clips.shape[-2:])
    return torch.einsum("rih,rcthw,rjw->rctij", rows, clips, columns)


def _gaussian(sigma: Tensor, side: int) -> Tensor:
    """[R] -> [R, side, side]; the identity if sigma is 0"""
    pixels = torch.arange(side, device=sigma.device)
    distance = (pixels[:, None] - pixels) / sigma.clamp(min=0.01)[:, None, None]
    weights = (-distance.square() / 2).exp()
    return weights / weights.sum(dim=-1, keepdim=True)
