"""Features and snapshots of Gaussian clouds."""

import torch

from jepa.evaluation.types import Features, Snapshot
from jepa.types import Masks, PatchGrid

GRID = PatchGrid(1, 4, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(num, *, dim=8, classes=3, spread=1.0, seed=0):
    """Gaussian clouds around one centre for each class."""
    centres = torch.randn(classes, dim, generator=seeded(99))
    labels = torch.randint(classes, (num,), generator=seeded(seed))
    return Features(centres[labels] + spread * torch.randn(num, dim, generator=seeded(seed + 1)), labels)


def masks_of(num, *, grid=GRID, seed=0):
    order = torch.rand(num, grid.num_tokens, generator=seeded(seed)).argsort(1)
    return Masks(order[:, :4].sort(1).values, order[:, 4:10].unflatten(1, (2, 3)).sort(2).values)


def snapshot_of(train, val, **changes):
    num, pictures = len(val.labels), min(6, len(val.labels))
    values = {
        "step": 0, "train": train, "val": val, "classes": ("ant", "bee", "cat"), "grid": GRID,
        "pictures": torch.randint(0, 256, (pictures, 3, 1, 16, 16), generator=seeded(1), dtype=torch.uint8),
        "tokens": torch.randn(pictures, GRID.num_tokens, train.vectors.shape[1], generator=seeded(2)),
        "thumbnails": torch.randint(0, 256, (num, 3, 32, 32), generator=seeded(3), dtype=torch.uint8),
        "masks": masks_of(32), "diagnosis": {"error": 0.25, "trivial_error": 1.0},
    }  # fmt: skip
    return Snapshot(**(values | changes))
