"""Files on servers, through fsspec: what is known of them, their bytes, and errors that say what to do.

Every request is tried again after failures that may pass, a bounded number of times, and ends in one error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from itertools import chain, count
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple, TypeVar

from jepa.config.paths import expand_braces
from jepa.config.urls import LISTLESS, protocol_of, shown
from jepa.data.folders import user_cache
from jepa.errors import SourceError

log = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S")
NUM_ATTEMPTS = 6
FIRST_ATTEMPTS = 4
"""Number of attempts while nothing has been read yet: a wrong address is likelier than a server that restarts."""
PAUSE = 1.0
"""Seconds before the second attempt; each later pause is twice as long."""
CONNECT_SECONDS, STALL_SECONDS, REQUEST_SECONDS = 15, 30, 180
"""Time that a server has to accept a connection, to send anything, and to answer a request for a block."""
NUM_THREADS = 16
PASSING_STATUS = {408, 425, 429}
"""Answers 4xx after which the same request may succeed."""
VERSIONS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "blob_id", "xet_hash", "LastModified", "Last-Modified", "updated",
    "mtime", "modified", "created",
)  # fmt: skip
"""Names under which file systems give what changes with the contents of a file, most reliable first."""
OTHER_ERRORS = (
    ("aiohttp", "ClientError"), ("httpx", "HTTPError"), ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"), ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"), ("huggingface_hub.errors", "HfUriError"),
)  # fmt: skip
"""Exceptions of file systems besides OSError: module and class."""
CREDENTIALS: Mapping[str, str] = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon for a public bucket",
    "hf": "run `hf auth login` and accept the terms on the page of the data set",
}


class RemoteFile(NamedTuple):
    url: str
    size: int
    version: str
    """changes with the contents, as far as the server tells; "" if it tells nothing"""
    has_ranges: bool = True
    """False if the server sends whole files only"""

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def folder(self) -> str:
        """URL of the folder, without a slash at the end."""
        return self.url.partition("?")[0].rpartition("/")[0]

    @property
    def identity(self) -> tuple[str, int, str]:
        return str(self), self.size, self.version


class IncompleteError(OSError):
    """An answer has not the bytes that were asked for."""


class UnreachableError(SourceError):
    """A server does not answer; what it said at an earlier time is used where it is known."""


def find_files(pattern: str, in_folder: str = "*.tar") -> list[RemoteFile]:
    """The files of a URL with braces, of a glob, or those `in_folder`, each once. Raises SourceError."""
    find = partial(_find_one, in_folder=in_folder)
    files = _remembered(f"{pattern} {in_folder}", lambda: [*chain(*each(find, [*expand_braces(pattern)]))])
    return list(dict.fromkeys(RemoteFile(*file) for file in files))


def _find_one(url: str, in_folder: str) -> list[RemoteFile]:
    has_magic = re.search(r"[*?[]", url) is not None
    if protocol_of(url) in LISTLESS or (url.endswith(in_folder[-4:]) and not has_magic):
        return [stat(url)]
    found = _list(url if has_magic else f"{url.rstrip('/')}/{in_folder}")
    if not found:
        raise SourceError(f"{shown(url)}: there is no file {'that matches' if has_magic else in_folder}; check the URL")
    return found


def list_files(pattern: str) -> list[RemoteFile]:
    """Files that match, by name; none from a server that cannot list. Raises SourceError."""
    if not pattern or protocol_of(pattern) in LISTLESS:
        return []
    return [RemoteFile(*file) for file in _remembered(pattern, lambda: _list(pattern))]


def _list(pattern: str) -> list[RemoteFile]:
    def listed() -> dict[str, Any]:
        files, path = _filesystem(pattern)
        return {files.unstrip_protocol(name): info for name, info in files.glob(path, detail=True).items()}

    found = retried(pattern, listed, FIRST_ATTEMPTS)
    return [_file(url, info) for url, info in sorted(found.items()) if info.get("type", "file") == "file"]


def _remembered(question: str, ask: Callable[[], T]) -> T:
    """The answer of a server; without network that of an earlier time, which is kept as JSON in the user's cache."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
    path = user_cache() / f".answer-{digest}.json"
    try:
        answer = ask()
    except UnreachableError as error:
        with suppress(OSError, ValueError):
            answer = json.loads(path.read_text())
            log.warning("%s; what it answered at an earlier time is used", str(error).partition(", also at")[0])
            return answer
        raise
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")
        part.write_text(json.dumps(answer))
        os.replace(part, path)
    return answer


def stat(url: str) -> RemoteFile:
    """Size and version of a file. Raises SourceError if there is none or it is no file of data."""

    def ask() -> Any:
        files, path = _filesystem(url)
        if protocol_of(url) not in LISTLESS:
            return files.info(path)
        from fsspec.asyn import sync

        return sync(files.loop, _http_info, files, path, timeout=REQUEST_SECONDS)

    return _file(url, retried(url, ask, FIRST_ATTEMPTS))


async def _http_info(files: Any, url: str) -> dict[str, Any]:
    """From the head of the answer to a request for the first byte, which also shows if the server sends ranges."""
    session = await files.set_session()
    async with session.get(files.encode_url(url), headers={"Range": "bytes=0-0", "Accept-Encoding": "identity"}) as r:
        r.raise_for_status()
        has_ranges = r.status == 206
        size = r.headers.get("Content-Range", "").rpartition("/")[2] if has_ranges else r.headers.get("Content-Length")
        is_page = r.content_type in ("text/html", "application/xhtml+xml")
        return {"size": int(size) if size and size.isdecimal() else None, "partial": has_ranges, "page": is_page,
                "ETag": r.headers.get("ETag"), "Last-Modified": r.headers.get("Last-Modified")}  # fmt: skip


def _file(url: str, info: Mapping[str, Any]) -> RemoteFile:
    if info.get("page"):
        raise SourceError(f"{shown(url)}: the server answers with a web page, not with a file of data; check the URL")
    if info.get("type", "file") != "file":
        raise SourceError(f"{shown(url)}: is a folder; give its files, as {shown(url).rstrip('/')}/*.tar")
    if info.get("size") is None:
        raise SourceError(f"{shown(url)}: the server does not tell its size, which is needed to know when it is whole")
    version = next((f"{name} {_plain(info[name])}" for name in VERSIONS if info.get(name)), "")
    return RemoteFile(url, int(info["size"]), version, info.get("partial", True))


def _plain(value: object) -> str:
    """As text; times, which come in several types and precisions, as whole seconds."""
    value = value.timestamp() if isinstance(value, datetime) else value
    return str(int(value) if isinstance(value, float) else value)


def has_changed(file: RemoteFile) -> bool:
    """True if the server has another file by now, as far as it tells. Raises SourceError."""
    now = stat(file.url)
    is_comparable = now.version.partition(" ")[0] == file.version.partition(" ")[0]
    return now.size != file.size or (is_comparable and now.version != file.version)


def read_range(file: RemoteFile, offset: int, size: int) -> bytes:
    """`size` bytes of the file, or those up to its end. Raises SourceError."""
    size = min(size, file.size - offset)
    if size <= 0:
        return b""

    def read() -> bytes:
        files, path = _filesystem(file.url)
        plain = {} if files.async_impl else {"cache_type": "none"}  # nothing is read ahead
        data = files.cat_file(path, start=offset, end=offset + size, **plain)
        if len(data) != size:
            raise IncompleteError(f"sent {len(data):,} of the {size:,} bytes from byte {offset:,} on")
        return data

    return retried(file.url, read)


def read_whole(file: RemoteFile, path: str) -> None:
    """Copy a file of a server that sends no ranges to `path`. Raises SourceError."""

    def copy() -> None:
        files, source = _filesystem(file.url, whole=True)
        files.get_file(source, path)
        if (size := os.stat(path).st_size) != file.size:
            raise IncompleteError(f"sent {size:,} of {file.size:,} bytes")

    retried(file.url, copy)


def read_text(url: str) -> str:
    """The contents of a small file; "" if there is none or it may not be read. Raises SourceError."""
    return _remembered(url, lambda: (read_small(url) or b"").decode(errors="replace"))


def read_small(url: str) -> bytes | None:
    """The contents of a small file; None if there is none or it may not be read. Raises SourceError."""

    def read() -> bytes | None:
        files, path = _filesystem(url)
        try:
            return files.cat_file(path)
        except _errors() as error:
            if not _explain(error, protocol_of(url))[1]:
                raise  # another attempt may succeed
            return None

    return retried(url, read, FIRST_ATTEMPTS)


def can_write(url: str) -> bool:
    """False for web servers and the hub, where nothing is stored."""
    return protocol_of(url) not in (*LISTLESS, "hf")


def write_small(url: str, data: bytes) -> bool:
    """Store a small file; False if that is not possible."""
    if not can_write(url):
        return False
    files, path = _filesystem(url)
    try:
        files.pipe_file(path, data)
    except (NotImplementedError, *_errors()):
        return False
    return True


@lru_cache(maxsize=64)
def _filesystem_of(protocol: str, host: str, whole: bool, pid: int) -> Any:
    """The file system of a protocol; one of each process, as the connections of fsspec do not survive a fork."""
    from fsspec.core import url_to_fs

    for library in ("httpx", "botocore", "aiobotocore"):
        logging.getLogger(library).setLevel(logging.WARNING)  # a line for each request otherwise
    options: dict[str, Any] = {}
    if protocol in LISTLESS:
        from aiohttp import ClientTimeout

        total = None if whole else REQUEST_SECONDS
        timeout = ClientTimeout(total=total, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
        options = {
            "client_kwargs": {"timeout": timeout, "trust_env": True},
            "headers": {"Accept-Encoding": "identity"},  # a range of a compressed answer is of no use
        }
    return url_to_fs(f"{protocol}://{host}", **options)[0]


def _filesystem(url: str, whole: bool = False) -> tuple[Any, str]:
    """The file system and the path in it."""
    protocol = protocol_of(url)
    files = _filesystem_of(
        protocol, "" if protocol in (*LISTLESS, "hf", "memory") else host_of(url), whole, os.getpid()
    )
    return files, files._strip_protocol(url)


def retried(url: str, action: Callable[[], T], num_attempts: int | None = None) -> T:
    """The result of `action`. Raises SourceError if it fails for good or `num_attempts` times."""
    num_attempts = num_attempts or NUM_ATTEMPTS
    for attempt in count(1):
        try:
            result = action()
            _silent_hosts().discard(host_of(url))
            return result
        except _errors() as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # of the disk, where the server is not at fault
            reason, advice = _explain(error, protocol_of(url))
            if advice:
                raise SourceError(f"{shown(url)}: {reason}; {advice}") from error
            if attempt >= num_attempts or host_of(url) in _silent_hosts():
                _silent_hosts().add(host_of(url))
                advice = "see that the server runs and can be reached from here, then run the same command again"
                raise UnreachableError(f"{shown(url)}: {reason}, also at attempt {attempt}; {advice}") from error
        pause = PAUSE * 2 ** (attempt - 1)
        log.warning("%s: %s; attempt %d of %d in %g s", shown(url), reason, attempt + 1, num_attempts, pause)
        time.sleep(pause)
    raise AssertionError


@lru_cache(maxsize=1)
def _silent_hosts() -> set[str]:
    """Hosts that did not answer the last time: this process asks them only once until they answer."""
    return set()


def host_of(url: str) -> str:
    return url.partition("://")[2].partition("/")[0] if protocol_of(url) not in ("hf", "memory") else protocol_of(url)


def _errors() -> tuple[type[BaseException], ...]:
    """Exceptions of the file systems that are imported."""
    modules = ((sys.modules.get(module), name) for module, name in OTHER_ERRORS)
    return (OSError, *(getattr(module, name) for module, name in modules if module is not None))


def _explain(error: Any, protocol: str) -> tuple[str, str]:
    """What has happened and, if another attempt is of no use, what to do."""
    kind, response = type(error).__name__, getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    private = CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "check the URL and its permissions")
    text = " ".join(str(getattr(error, "message", "") or error or kind).split())[:200] or kind
    if isinstance(error, PermissionError) or status in (401, 403) or kind in ("GatedRepoError", "HttpForbidden"):
        return f"the server refuses access{f' ({status})' if status else ''}", private
    if "Credentials" in kind or "no credentials" in text.lower() or "Unable to locate credentials" in text:
        return f"there are no credentials for {protocol}://", private
    if kind == "HfUriError":
        return "names nothing on the hub", "expected hf://datasets/ORG/NAME, or files in it"
    if isinstance(error, FileNotFoundError) or status in (404, 410) or kind == "RepositoryNotFoundError":
        return "there is no such file", "check the spelling"
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return "the server does not answer in time", ""
    if isinstance(status, int):
        is_final = 400 <= status < 500 and status not in PASSING_STATUS
        return f"the server answers {status} {text if kind != 'ClientResponseError' else error.message}", (
            "check the URL" if is_final else ""
        )
    if kind.startswith("ClientConnector"):
        return f"cannot connect ({getattr(error, 'strerror', '') or text})", ""
    return ("the answer was cut off" if kind in ("ClientPayloadError", "ServerDisconnectedError") else text), ""


def size_text(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def each(function: Callable[[S], T], items: Sequence[S], num_threads: int | None = None) -> list[T]:
    """`[function(item) for item in items]` in daemon threads: a Ctrl-C or an error does not wait for the others."""
    with ThreadPool(max(1, min(num_threads or NUM_THREADS, len(items)))) as pool:
        return list(pool.imap(function, items))
