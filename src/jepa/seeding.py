"""Seeds and generators as pure functions of the run's seed, step, rank and the name of a stream."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, step: int, rank: int, stream: str) -> int:
    """A 63-bit seed that depends only on the arguments; streams, such as "masks" and "augment", are independent."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, step: int, rank: int, stream: str) -> torch.Generator:
    """A CPU generator, seeded by `derive_seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, step, rank, stream))
