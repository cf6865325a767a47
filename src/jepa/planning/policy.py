"""Planning without search: the policy head of a world acts by itself."""

from __future__ import annotations

from torch import Tensor

from jepa.planning.types import Search


class PolicyPlanner:
    """The action of the policy head (goal-conditioned inverse dynamics), one in each step."""

    is_discrete = None
    warm_start = "policy"
    horizon = 1
    execute = 1

    def __init__(self) -> None:
        """It has no settings."""

    def __call__(self, search: Search) -> Tensor:
        assert search.warm_start is not None
        return search.warm_start
