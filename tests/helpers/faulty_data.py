"""A data set that the second of two ranks cannot read, for tests of what a job says then."""

from __future__ import annotations

import os

from torch import Tensor

from jepa.data.embedded import Shapes


class UnreadableOnOneRank(Shapes):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if os.environ.get("RANK") == "1":
            raise OSError("the cable is out")
        return super().__getitem__(index)
