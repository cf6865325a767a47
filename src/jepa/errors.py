"""The exceptions that end a run with a message instead of a traceback."""

from __future__ import annotations

import errno
import os
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


ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, then run the same command again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "allow it, give another path or start elsewhere"),
    errno.ENOTDIR: "a part of the path is a file: move it away or give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""Number of an error of the system -> what to do."""


def explain(error: OSError) -> str:
    """One line that names the path, the reason and what to do about an error of the system."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return f"{f'{path}: ' if path else ''}{reason}; {ADVICE.get(error.errno or 0, 'mend this and run it again')}"


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Raise RunError for an error of a file, a disk or the network that nothing below has explained."""
    try:
        yield
    except SourceError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        raise RunError(explain(error)) from error


class SourceError(Exception):
    """Data on a server cannot be read, after all attempts; the message says why and what to do.

    It is no OSError, as the sample is not at fault and no other one may take its place.
    """


class FileError(RunError, ValueError):
    """A file is damaged or holds what it should not; the message names it."""


class Interrupted(Exception):
    """Work was interrupted by a request to stop the run; what is done is saved."""
