"""What Ray starts in a worker, before anything of ours is imported there: it travels by value, with its own code.

So it also runs where our package is missing, broken, shadowed or of another version, and can say so. Nothing here but
the inside of `_ray_worker` may need a module of the package that is not sent along.
"""

from __future__ import annotations

import pickle
import socket
import sys
import time
from importlib import import_module
from typing import Any

import pyarrow as pa

from latentmill.jobs import code as code_module
from latentmill.jobs.code import Code, installed_code
from latentmill.jobs.executors import ray_private
from latentmill.jobs.executors import worker_registry as registry_module

_RAY_WORKER = "latentmill.jobs.executors.ray_worker"
_FAULTS = (Exception, SystemExit)
"""What importing somebody's modules may raise, whatever they are."""

_PAUSE_SECONDS = 1.0
"""A worker that cannot work takes its time for each chunk, so as not to swallow those of the sound ones."""


def send_by_value() -> None:
    """Afterwards this process sends the modules that a worker needs for its first steps along with what it sends."""
    ray_private.pickle_by_value(sys.modules[__name__], code_module, registry_module)


class WrongCodeError(Exception):
    """The driver's code is not what a worker would import; the text says what is."""


class Generate:
    """An actor: one model, loaded once. No exception leaves it, for Ray would restart it for ever, or drop its block.

    `arguments` are those of `ray_worker.PooledWorker`, pickled: unpickling them needs modules of ours.
    """

    def __init__(self, code: Code, registry: Any, arguments: bytes) -> None:
        import ray

        context = ray.get_runtime_context()
        worker, node = context.get_actor_id(), context.get_node_id()
        self._worker: Any = None
        if not ray.get(registry.enter.remote(worker, node, context.current_actor)):
            return
        try:
            self._worker = _ray_worker(code).PooledWorker(worker, registry, *pickle.loads(arguments))  # noqa: S301 - from our own driver
        except _FAULTS as error:
            registry.unfit.remote(node, _reason(error))
        else:
            registry.ready.remote(worker)

    def __call__(self, batch: pa.Table) -> pa.Table:
        chunk = int(batch["chunk"][0].as_py())
        if self._worker is None:
            time.sleep(_PAUSE_SECONDS)
            return _row(chunk, None)
        return _row(chunk, self._worker.generate(chunk))


def postprocess(batch: pa.Table, code: Code, registry: Any, place: tuple[str, str]) -> pa.Table:
    """A task: watermark, encode, write and commit one chunk; a result passes through."""
    chunk, payload = int(batch["chunk"][0].as_py()), batch["payload"][0]
    if not payload.is_valid:
        return _row(chunk, None)
    try:
        ray_worker = _ray_worker(code)
    except _FAULTS as error:
        import ray

        registry.unfit.remote(ray.get_runtime_context().get_node_id(), _reason(error))
        time.sleep(_PAUSE_SECONDS)
        return _row(chunk, None)
    return _row(chunk, ray_worker.postprocess_payload(payload.as_buffer(), registry, place))


def run_task(code: Code, call: bytes, item: Any) -> Any:
    """A task of no job: a pickled function of ours, for one item."""
    _ray_worker(code)
    return pickle.loads(call)(item)  # noqa: S301 - from our own driver


def _ray_worker(code: Code) -> Any:
    """Our own part of the work. Raises WrongCodeError unless the driver's very code can be imported here."""
    if _RAY_WORKER not in sys.modules:
        remedy = "install the same version there, or use `latentmill submit`, which sends its code along"
        here = installed_code()
        if here is None:
            raise WrongCodeError(f"latentmill is not installed for {sys.executable}; {remedy}")
        if here.digest != code.digest:
            raise WrongCodeError(f"{here} is found at {here.place}, but this command runs {code}; {remedy}")
    return import_module(_RAY_WORKER)


def _reason(error: BaseException) -> str:
    """Why nothing can work on this node, in one line."""
    text = " ".join(str(error).split())[:1000]
    ours = type(error).__module__.startswith("latentmill.")
    return f"on {socket.gethostname()} {text if ours else f'latentmill cannot start: {type(error).__name__}: {text}'}"


def _row(chunk: int, payload: bytes | None) -> pa.Table:
    """One row, so that no block boundary can ever run through a chunk; without a payload the chunk was not tried."""
    columns = {"chunk": pa.array([chunk], pa.int64()), "payload": pa.array([payload], pa.large_binary())}
    return pa.table(columns)
