"""URLs of data, checked by their protocol alone: without torch and without network."""

from __future__ import annotations

import re

from jepa.suggestions import suggestion

EXTRAS = {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""Protocols of `pip install 'jepa-train[remote]'`, with the package that each needs."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Protocols that need one more package."""
LISTLESS = ("http", "https")
"""Protocols that cannot list a folder."""


def is_url(text: object) -> bool:
    return isinstance(text, str) and re.match(r"([A-Za-z][\w+.-]*::?)+/", text) is not None


def protocol_of(url: str) -> str:
    return url.partition(":")[0].lower()


def shown(url: str) -> str:
    """The URL without what may be secret: a password, and the signature after a question mark."""
    without_query = url.partition("?")[0] if protocol_of(url) in LISTLESS else url
    return re.sub(r"(?<=://)[^/@]*@", "", without_query)


def check_url(url: str) -> None:
    """Raises ValueError with a sentence without key and value if no file system can read such a URL here."""
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    protocol = protocol_of(url)
    if "://" not in url:
        raise ValueError(f"a URL begins with {protocol}://, with two slashes")
    if "::" in url.partition("://")[0] or re.search(r"::[A-Za-z][\w+.-]*://", url):
        raise ValueError("give one URL without ::, whole files are cached anyway")
    if protocol in ("file", "local"):
        raise ValueError(f"files of this machine are named by their path: {url.partition('://')[2]}")
    if protocol not in known_implementations:
        known = ("s3", "gs", "https", "http", "hf")
        guess = suggestion(protocol, known) or f"; expected {', '.join(known)} or another one of fsspec"
        raise ValueError(f"there is no protocol {protocol}://{guess}")
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        if protocol in EXTRAS:
            advice = f"needs {EXTRAS[protocol]}: pip install 'jepa-train[remote]'"
        elif protocol in PACKAGES:
            advice = f"needs {PACKAGES[protocol]}: pip install {PACKAGES[protocol]}"
        else:
            advice = f"cannot be read: {known_implementations[protocol].get('err') or error}"
        raise ValueError(f"{protocol}:// {advice}") from error


def check_shard_url(pattern: str) -> None:
    """Raises ValueError with a sentence without key and value for a URL that cannot stand for tar shards."""
    check_url(pattern)
    if protocol_of(pattern) not in LISTLESS:
        return
    path = pattern.partition("?")[0].partition("://")[2].partition("/")[2]
    if "*" in path or "[" in path:
        raise ValueError("a web server cannot list its files; name them in braces, as train-{000..099}.tar")
    if not path.endswith(".tar"):
        raise ValueError("is the URL of no .tar, and a web server cannot list a folder; name its shards in braces")
