"""A session with a Ray cluster: one of its own on this machine, or another's, which is joined and left as it was."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.jobs.code import package_root
from latentmill.jobs.errors import UsageError
from latentmill.jobs.executors import ray_private
from latentmill.jobs.scratch import CLUSTER_PREFIX, scratch_folder, short_base
from latentmill.jobs.store.urls import display_url
from latentmill.jobs.terminal import held_back_stderr

_OBJECT_STORE_BYTES = 128 * 2**20
"""Calls and their answers are all that goes through Ray, no pictures. The share of the memory that Ray takes by itself
costs a second at the start, since every page of it is touched."""

_ASK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """A session with a cluster; `ending` undoes what this process did to get it."""

    where: str
    ending: ExitStack
    head: str | None = None
    """HOST:PORT of somebody else's cluster, which nodes may join and leave; None for one of our own."""

    @property
    def joined(self) -> bool:
        """Whether the cluster is somebody else's."""
        return self.head is not None

    def nodes(self) -> list[dict[str, Any]]:
        """The cluster's nodes as Ray tells them."""
        import ray

        found: list[dict[str, Any]] = ray.nodes()
        return found

    def close(self) -> None:
        self.ending.close()


def connect(address: str | None, *, insecure: bool = False) -> Connection:
    """A session with the cluster at `address` or RAY_ADDRESS, else with one of its own that nobody else can use.

    Raises UsageError if no cluster answers, or if it serves anyone who reaches it and `insecure` does not allow that.
    """
    for name, value in ray_private.QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"Ray cannot be imported ({error}); install it, or use --executor inline") from error
    if ray.is_initialized():
        return Connection(where="the session of this process", ending=ExitStack())
    address = address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as undo:
        head = None
        if address and address != "local":
            where = f"cluster at {display_url(address)}"
            folder = undo.enter_context(scratch_folder(short_base(), CLUSTER_PREFIX))
            head = _join_cluster(address, folder, insecure=insecure)
        else:
            where = f"this machine, {_cores()} cores"
            folder = undo.enter_context(scratch_folder(short_base(), CLUSTER_PREFIX))
            undo.enter_context(_private_token(folder / "token"))
            _start_cluster(folder)
        undo.callback(ray.shutdown)
        return Connection(where=where, ending=undo.pop_all(), head=head)


def _join_cluster(address: str, folder: Path, *, insecure: bool) -> str:
    """The HOST:PORT of the cluster that this process has joined."""
    import ray

    where = display_url(address)
    with held_back_stderr():
        try:
            endpoint = _endpoint(address)
            guarded = asks_for_a_token(endpoint)
            if not guarded and not insecure:
                raise UsageError(open_cluster_text(where))
            if guarded and ray_private.refuses(
                endpoint, ray_private.own_token()
            ):  # Ray would try for twenty seconds, and not say why
                raise UsageError(locked_out_text(where))
            ray.init(
                address=endpoint,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_nowhere(folder),
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"no Ray cluster answers at {where}: {reason}; check --address or RAY_ADDRESS") from error
    return endpoint


def open_cluster_text(where: str) -> str:
    """What is wrong with a cluster without tokens, and what to do: anyone who reaches it can run code on it."""
    return (
        f"the Ray cluster at {where} runs code for anyone who can reach it (CVE-2023-48022); start its nodes with "
        f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH naming a file of mode 0600, or, on a network that only you can "
        f"reach, pass --insecure-ray"
    )


def locked_out_text(where: str) -> str:
    """What a client without the cluster's token does next."""
    return (
        f"the Ray cluster at {where} asks for a token, and does not take the one given here, if any; set "
        f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of the head's token file (mode 0600)"
    )


def no_process_text(how: str) -> str:
    """What to look for where Ray starts no process at all."""
    return (
        f"Ray could not start worker processes from {socket.gethostname()}: {how}; look for files that hide Python "
        f"modules of their name (PYTHONPATH), and for free memory and disk"
    )


def _endpoint(address: str) -> str:
    """HOST:PORT of a head where something listens. Raises OSError otherwise: Ray itself would try for two minutes."""
    if address == "auto":
        found = ray_private.local_head()
        if found is None:
            raise OSError("no cluster runs on this machine")
        address = found
    host, separator, port = address.rpartition(":")
    if "://" in address or not separator or not port.isdigit():
        raise ValueError("it is not HOST:PORT or auto; give the head node's address, for example 10.0.0.5:6379")
    socket.create_connection((host, int(port)), timeout=_ASK_SECONDS).close()
    return address


def asks_for_a_token(endpoint: str) -> bool:
    """Whether the head refuses a caller without a token: asked as such a caller, whatever this process could show."""
    return ray_private.refuses(endpoint, {})


@contextmanager
def _private_token(path: Path) -> Iterator[None]:
    """Within, clusters that this process starts ask for a token that only its user can read, in a file of their own."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    ray_private.read_tokens_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        ray_private.read_tokens_again()


def _start_cluster(folder: Path) -> None:
    import ray

    with _importable_by_children(folder), held_back_stderr():
        ray.init(
            address="local",
            num_cpus=_cores(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env=_nowhere(folder),
            **ray_private.session_folder(folder / "r"),  # open to everyone: the folder above does not let them in
        )


def _nowhere(folder: Path) -> dict[str, str]:
    """A runtime environment whose workers run in an empty folder.

    Without it Ray puts the driver's script's folder and its current one first on the workers' path, where a file of the
    user's, such as a torch.py, would be imported in place of the module of that name. A job of the jobs API has
    its own working folder, and Ray takes no second one.
    """
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    if "working_dir" in given:
        return {}
    empty = folder / "empty"
    empty.mkdir()
    return {"working_dir": str(empty)}


@contextmanager
def _importable_by_children(folder: Path) -> Iterator[None]:
    """Within, processes that are started find this very package, installed or not, and no current folder's."""
    before = os.environ.get("PYTHONPATH")
    code = folder / "code"
    code.mkdir()
    (code / "latentmill").symlink_to(package_root())
    named = [place for place in (before or "").split(os.pathsep) if place]  # an empty one is the current folder
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *map(os.path.abspath, named)])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
