"""Clients of disks and object stores: how long each waits for an answer, and how often it tries again.

Retries of several layers multiply: five of botocore, of s3fs and of a job would last three quarters of an hour on one
stalled connection. So exactly one layer repeats. What a user's fsspec configuration says
(`FSSPEC_S3='{"config_kwargs": {"read_timeout": 60}}'`, or a file in `~/.config/fsspec`) takes precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from latentmill.jobs.errors import UsageError

CONNECT_SECONDS = 10
ANSWER_SECONDS = 20
"""The longest silence on a connection; the length of an upload or a download does not count."""

CLIENT_TRIES = 4
"""Tries of a client per request, if no layer above it repeats."""

_INSTALL = {"s3": "s3fs", "gs": "latentmill[gcs]", "abfs": "latentmill[azure]", "hf": "huggingface_hub"}


def open_client(protocol: str, *, repeats: bool) -> AbstractFileSystem:
    """The filesystem of an allowed protocol, without a listings cache; nothing is contacted yet.

    `repeats`: the caller repeats failed calls itself, so the client shall not.
    """
    try:
        if protocol == "s3":
            return _s3(repeats=repeats)
        return fsspec.filesystem(protocol, use_listings_cache=False, **_timeouts(protocol))
    except ImportError as error:
        raise UsageError(
            f"{protocol}:// needs an extra package: pip install {_INSTALL.get(protocol, protocol)!r}"
        ) from error


def _timeouts(protocol: str) -> dict[str, Any]:
    """For stores whose clients always retry (gcsfs six times, Azure's four)."""
    configured = fsspec.config.conf.get(protocol, {})
    if protocol == "gs" and "session_kwargs" not in {**fsspec.config.conf.get("gcs", {}), **configured}:
        import aiohttp  # comes with gcsfs

        return {
            "session_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)}
        }
    if protocol == "abfs":
        settings = {"connection_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
        return {name: seconds for name, seconds in settings.items() if name not in configured}
    return {}


def _s3(*, repeats: bool) -> AbstractFileSystem:
    tries = 1 if repeats else CLIENT_TRIES
    settings: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings["retries"] = {"mode": "standard", "total_max_attempts": tries}
    configured = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}.get("config_kwargs", {})
    if not isinstance(configured, Mapping):  # one string in an .ini file: nothing can be added to it
        return fsspec.filesystem("s3", use_listings_cache=False)
    fs = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs={**settings, **configured})
    fs.retries = 1 if repeats else 2  # of a dropped connection, which multiplies the client's own; s3fs has no option
    return fs
