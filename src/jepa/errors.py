"""The exceptions that end a run with a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration is wrong; `errors` has one sentence for each reason."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(dict.fromkeys(errors))
        count = f"{len(self.errors)} error{'s' * (len(self.errors) > 1)} in the configuration, nothing was started"
        super().__init__("\n".join([count, *(f"  {error}" for error in self.errors)]))


@contextmanager
def as_config_errors(prefix: str = "") -> Iterator[None]:
    """Raise ConfigError for any other ValueError, such as those of constructors, with `prefix` before its message."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"{prefix}{error}"]) from error


class RunError(RuntimeError):
    """A run cannot start or continue; the message says why and what to do, and is shown without a traceback."""

    on_all_ranks = False
    """True if all ranks raise the same error, so that only rank 0 needs to print it."""


class FileError(RunError, ValueError):
    """A file is damaged or holds what it should not; the message names it."""


class Interrupted(Exception):
    """An evaluation was interrupted by a request to stop the run."""
