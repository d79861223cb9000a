"""The driver's side of the worker registry: it starts it, looks at it once a second, and acts on what it sees."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.ray_isolated import GRACE_SECONDS
from latentmill.jobs.executors.worker_registry import Overview, WorkerRegistry
from latentmill.jobs.terminal import print_line

_WATCH_SECONDS = 1.0
_HEAD_SECONDS = 5.0
START_SECONDS = 60.0
"""What the start of the first process may take: a second or two, where nothing else runs."""


def open_registry(chunk_timeout: float | None) -> Any:
    """The job's registry, on the driver's own node: where that goes, the driver goes too.

    Raises JobError if no process can be started there, for which Ray itself would try for ever.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    registry = ray.remote(WorkerRegistry).options(**options).remote(chunk_timeout)
    try:
        ray.get(registry.start_pass.remote(), timeout=START_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise JobError(
            f"Ray could not start a process on {socket.gethostname()} within {START_SECONDS:g} s; look for files that "
            f"hide Python modules of their name (PYTHONPATH), and for free memory and disk"
        ) from None
    return registry


class Watch:
    """Looks at the registry once a second: kills workers that hang beyond their deadline, and passes a stop on."""

    def __init__(self, registry: Any, head: str | None) -> None:
        self._registry = registry
        self._head = head
        self.overview = Overview(ready=0, begun=0, overdue=(), unfit={})
        self.under_way: frozenset[int] | None = None
        """Once the workers were told to stop: the chunks that may still be in flight."""

    @contextmanager
    def over(self, stopping: threading.Event, left_out: Collection[str]) -> Iterator[Watch]:
        """Watch one pass; a node that turns out to be unfit and is not `left_out` yet ends it, as `stopping` does."""
        self.under_way = None
        over = threading.Event()
        thread = threading.Thread(
            target=self._look, args=(stopping, frozenset(left_out), over), name="watch", daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join(_WATCH_SECONDS)
            self.overview = replace(self.overview, ready=0, begun=0)

    def _look(self, stopping: threading.Event, left_out: frozenset[str], over: threading.Event) -> None:
        import ray

        head_asked, head_silent = time.monotonic(), False
        with suppress(ray.exceptions.RayError):  # the main thread meets the same error, and says what it means
            while not over.wait(_WATCH_SECONDS):
                if time.monotonic() - head_asked > _HEAD_SECONDS:
                    head_asked, head_silent = time.monotonic(), self._tell_of_silence(head_silent)
                self.overview = ray.get(self._registry.overview.remote(GRACE_SECONDS))
                for worker in self.overview.overdue:
                    ray.kill(worker, no_restart=False)
                if stopping.is_set() or not left_out.issuperset(self.overview.unfit):
                    begun = frozenset(ray.get(self._registry.stop.remote()))  # each time: it may be a new registry
                    self.under_way = begun if self.under_way is None else self.under_way

    def _tell_of_silence(self, told: bool) -> bool:
        """Whether the head is silent, said once: after a minute of it, Ray ends this process without a word."""
        if self._head is None:
            return False
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError:
            if not told:
                text = (
                    f"the head of the Ray cluster at {self._head} does not answer; if it stays away for a minute this "
                )
                print_line(f"latentmill: {text}command ends: run it again then, it resumes", error=True)
            return True
        return False
