"""The exceptions that end a run with a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """Everything that is wrong with a configuration; `faults` holds one sentence each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(dict.fromkeys(faults))
        count = f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)} in the configuration, nothing was started"
        super().__init__("\n".join([count, *(f"  {fault}" for fault in self.faults)]))


@contextmanager
def as_config_errors() -> Iterator[None]:
    """What a constructor refuses is a fault of the configuration."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error


class RunError(RuntimeError):
    """A run that cannot begin or go on; the message says why and what to do, and needs no traceback."""

    on_all_ranks = False
    """whether all ranks of a run have it alike, so that one of them is enough to tell it"""


class Interrupted(Exception):
    """An evaluation was left because the run is asked to stop."""
