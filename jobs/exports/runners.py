"""Where the shards of an export are written: in threads of this process, or by tasks of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial

from latentmill.jobs.executors.ray_tasks import run_tasks
from latentmill.jobs.exports.documents import ShardRecord
from latentmill.jobs.exports.shards import Export, open_export, write_shard
from latentmill.jobs.store.urls import shared_url

_THREADS = 4


def threads(export: Export, numbers: Sequence[int]) -> Iterator[ShardRecord]:
    """Several shards at once; the first error ends it, once those at work have ended."""
    pool = ThreadPoolExecutor(export.spec.workers or _THREADS)
    try:
        for future in as_completed([pool.submit(write_shard, export, number) for number in numbers]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def ray(export: Export, numbers: Sequence[int]) -> Iterator[ShardRecord]:
    """The same by tasks of a cluster, whose nodes reach both places."""
    spec = export.spec
    places = (shared_url(url, here="threads") for url in (export.source.job.url, spec.out))
    keys = tuple(None if file is None else os.path.abspath(file) for file in (spec.sign, spec.key))  # noqa: PTH100 - a name
    call = partial(_write_there, (*places, *keys))
    return run_tasks(call, numbers, at_once=spec.workers, address=spec.address, insecure=spec.insecure_ray)


def _write_there(places: tuple[str | None, ...], number: int) -> ShardRecord:
    return write_shard(_opened(*places), number)


_opened = lru_cache(maxsize=1)(open_export)
