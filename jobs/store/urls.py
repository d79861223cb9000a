"""Which places a job may read from and write to: the one list of allowed protocols."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from latentmill.jobs.errors import UsageError

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

PROTOCOLS = ("file", "s3", "gs", "abfs", "memory", "hf")


def allowed_filesystem(url: str, *, repeats: bool = False) -> tuple[AbstractFileSystem, str]:
    """Open the filesystem of `url` without a listings cache and return it with the path inside it.

    A bare path is local, made absolute. Anything but the allowed protocols is refused, chained URLs too, because they
    reach other protocols indirectly. Nothing is contacted yet. `repeats`: the caller repeats failed calls
    itself.
    """
    if not url.strip():
        raise UsageError("the address is empty; give a local path or a URL such as s3://bucket/prefix")
    if "\0" in url or "::" in url:
        raise UsageError(f"{display_url(url)!r} is a chained or malformed URL; give one plain path or URL without '::'")
    from latentmill.jobs.store.clients import open_client  # it imports fsspec, which `--help` does not need

    protocol, separator, rest = url.partition("://")
    if not separator:
        protocol, rest = "file", url
    if protocol not in PROTOCOLS:
        raise UsageError(f"{display_url(url)!r} uses {protocol!r}; only {', '.join(PROTOCOLS)} are allowed")
    if protocol == "file":
        return open_client(protocol, repeats=repeats), os.path.abspath(os.path.expanduser(rest))  # noqa: PTH100, PTH111 - must not touch the disk
    if ":" in rest.split("/", 1)[0].rpartition("@")[0]:
        raise UsageError(f"{display_url(url)!r} carries a password; give credentials by environment or profile instead")
    if ".." in rest.split("/"):
        raise UsageError(f"{display_url(url)!r} contains '..'; write the address without it")
    fs = open_client(protocol, repeats=repeats)
    return fs, str(fs._strip_protocol(url))


def place_of(url: str) -> tuple[str, str]:
    """The protocol and the path of an allowed URL or path: one name for one place, symbolic links followed."""
    fs, path = allowed_filesystem(url)
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return ("file", os.path.realpath(path)) if protocol in {"file", "local"} else (protocol, path.rstrip("/"))


def refuse_inside(place: str, dataset: str) -> None:
    """Raises UsageError if a place to write to lies inside a dataset: what lies there is the job's own."""
    (protocol, path), (own_protocol, own) = place_of(place), place_of(dataset)
    if protocol == own_protocol and f"{path}/".startswith(f"{own}/"):
        raise UsageError(
            f"{display_url(place)} lies inside the dataset {display_url(dataset)}; name a place outside it with --out"
        )


def shared_url(url: str, here: str) -> str:
    """The place as every process understands it, wherever it was started; links in a path are those of each node.

    Raises UsageError if only this process has it. `here` is the executor that needs no other process.
    """
    fs, path = allowed_filesystem(url)
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if protocol == "memory":
        raise UsageError(f"{display_url(url)} lives in one process only; use --executor {here} or another place")
    return path if protocol in {"file", "local"} else url


def display_url(url: str) -> str:
    """The URL as it may be shown and stored: no user, no password, no query."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("?")[0].partition("/")
    user, at, after = host.rpartition("@")
    # abfs://container@account is an address, not a user; a colon before the @ means a password.
    if at and (":" in user or protocol != "abfs"):
        host = after
    return f"{protocol}://{host}{slash}{path}"
