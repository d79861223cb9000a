"""One function for many items, by tasks of a Ray cluster: for work that needs no model and may be done twice."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from latentmill.jobs.chunk_result import describe_fault
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.ray_cluster import connect
from latentmill.jobs.executors.ray_entry import run_task, send_by_value

_RETRIES = 3
"""Of a task whose process or node dies."""


def run_tasks(
    call: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    at_once: int | None,
    address: str | None,
    insecure: bool,
    gpus: int | None = 0,
) -> Iterator[Any]:
    """What `call` returns for each item, as it comes. `call` is pickled, and takes a CPU; each runs in any process.

    It takes so many `gpus` as well; with None one, if the cluster has any. A process that is done with an item takes
    the next one, also with a GPU, so what `call` keeps in memory is loaded once. At most `at_once` run at once, by
    default as many as the cluster has CPUs, or GPUs where they take one. The first error ends it: a JobError as it was
    raised, anything else as one.
    """
    import ray

    connection = connect(address, insecure=insecure)
    try:
        send_by_value()
        there = Counter[str]()
        for node in connection.nodes():
            there.update({name: int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU") if node["Alive"]})
        taken = (1 if there["GPU"] else 0) if gpus is None else gpus
        if taken > there["GPU"]:
            raise UsageError(f"device cuda needs a GPU, and the cluster has {there['GPU']}; use --device cpu or auto")
        limit = at_once or max(1, there["GPU"] // taken if taken else there["CPU"])
        task = ray.remote(num_cpus=1, num_gpus=taken, max_calls=0, max_retries=_RETRIES)(run_task)
        code, function, rest = own_code(), pickle.dumps(call), iter(items)
        waiting: list[Any] = []
        while True:
            waiting += [task.remote(code, function, item) for item in islice(rest, limit - len(waiting))]
            if not waiting:
                return
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JobError):
            raise error.cause from error
        raise JobError(f"a task on Ray failed: {describe_fault(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray gave up: {describe_fault(error)}; run the same command again: it resumes") from error
    finally:
        connection.close()
