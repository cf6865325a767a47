"""A small model and data set that record their calls."""

import torch
from torch import nn

from jepa.objectives.base import Objective
from jepa.parallel.session import Session
from jepa.types import Masks, PatchGrid

GRID = PatchGrid(1, 4, 4)
CPU = Session(device=torch.device("cpu"), bf16=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Images:
    """Random pictures of several sizes; some can't be read."""

    channels, classes, mean, std = 3, ("ant", "bee", "cat"), (0.5,) * 3, (0.25,) * 3

    def __init__(self, num, *, held_out=None, broken=(), brightness=0):
        self.num, self.held_out, self.broken, self.brightness = num, held_out, broken, brightness
        self.num_read = 0

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        self.num_read += 1
        if index in self.broken:
            raise OSError("cut short")
        clip = torch.randint(0, 200, (3, 1, 16, 16 + index % 3), generator=seeded(index), dtype=torch.uint8)
        return clip + self.brightness, index % 3

    def describe(self, index):
        return f"picture {index}"

    def validation(self):
        return self.held_out


class Crop:
    """[C, T, H, W] of any width -> [b, C, T, 16, 16]."""

    def pictures(self, clips):
        return torch.stack([clip[..., :16] for clip in clips])

    def normalise(self, pixels):
        return pixels / 255


class Toy(Objective):
    """A convolution as backbone; records its calls."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.frozen = nn.Dropout(0.5).eval()
        self.calls = []

    def diagnose(self, batch, masks):
        self.calls.append((batch, masks))
        return {"error": batch.labels.float().mean(), "trivial_error": torch.tensor(2.0)}


class Backbone(nn.Module):
    grid = GRID

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.drop = nn.Dropout(0.5)

    def grid_of(self, clips):
        return GRID

    def forward(self, clips):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.drop(self.patches(clips[:, :, 0])).flatten(2).mT


def random_masker(num, generator):
    order = torch.rand(num, GRID.num_tokens, generator=generator).argsort(1)
    return Masks(order[:, :4].sort(1).values, order[:, 4:10].unflatten(1, (2, 3)).sort(2).values)
