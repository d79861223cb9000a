"""A session with a Ray cluster: one of its own on this machine, or another's, which is joined and left as it was."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import UsageError
from jobs.executors.scratch import scratch_folder
from jobs.show.display import held_back_stderr
from jobs.store.urls import display_url

FEEDER_CPUS = 1
"""Ray Data's own repartition task asks for a whole CPU; without one to spare the pool starves and hangs."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # "(raylet) Task ... failed" comes through even with log_to_driver=False
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """A session with a cluster; `ending` undoes what this process did to get it."""

    where: str
    ending: ExitStack

    def resources(self) -> dict[str, float]:
        import ray

        found: dict[str, float] = ray.cluster_resources()
        return found

    def close(self) -> None:
        self.ending.close()


def connect(address: str | None) -> Connection:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"Ray cannot be imported ({error}); install it, or use --executor inline") from error
    if ray.is_initialized():
        return Connection(where="the session of this process", ending=ExitStack())
    address = address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as undo:
        if address and address != "local":
            where = f"cluster at {display_url(address)}"
            _join_cluster(address)
        else:
            where = f"this machine, {_cores()} cores"
            _start_cluster(undo.enter_context(scratch_folder()))
        undo.callback(ray.shutdown)
        # Called first: a dataset that was left early holds generators in reference cycles, and one that is finalised
        # after the shutdown (Ray has a thread that collects garbage) ends the whole process with exit code 1.
        undo.callback(gc.collect)
        return Connection(where=where, ending=undo.pop_all())


def _join_cluster(address: str) -> None:
    import ray

    where = display_url(address)
    with held_back_stderr():
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            token = (
                "" if os.environ.get("RAY_AUTH_MODE") else ", and set RAY_AUTH_MODE=token if the cluster asks for one"
            )
            raise UsageError(
                f"no Ray cluster answers at {where}: {reason}; check --address or RAY_ADDRESS{token}"
            ) from error


def _knock(address: str) -> None:
    """Raise OSError if nothing listens there: Ray itself would try for two minutes."""
    if address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if "://" in address or not separator or not port.isdigit():
        raise ValueError("it is not HOST:PORT or auto; give the head node's address, for example 10.0.0.5:6379")
    socket.create_connection((host, int(port)), timeout=10).close()


def _start_cluster(folder: Path) -> None:
    import ray

    with _importable_by_children(), held_back_stderr():
        ray.init(
            address="local",
            num_cpus=_cores() + FEEDER_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_object_store_bytes(),
            _temp_dir=str(folder / "r"),  # Ray opens it to everyone: the folder above does not let them in
        )


@contextmanager
def _importable_by_children() -> Iterator[None]:
    """Within, processes that are started find this package, installed or not, whatever their working folder."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{before}" if before else here
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _object_store_bytes() -> int:
    """A bounded share of the memory: the pictures of a few chunks are all that is ever in flight."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(128 * _MIB, min(2048 * _MIB, total // 8))
