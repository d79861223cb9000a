"""What Ray starts in a worker, before anything of ours is imported there: it travels by value, with its own code.

So it also runs where our package is missing, broken, shadowed or of another version, and can say so. Nothing here but
the inside of `_ray_worker` may need a module of the package that is not sent along.
"""

from __future__ import annotations

import gc
import pickle
import socket
import sys
from importlib import import_module
from typing import Any

from latentmill.jobs import code as code_module
from latentmill.jobs.code import Code, installed_code
from latentmill.jobs.executors import ray_private

_RAY_WORKER = "latentmill.jobs.executors.ray_worker"
_FAULTS = (Exception, SystemExit)
"""What importing somebody's modules may raise, whatever they are."""

MODEL, FINISH = "model", "finish"
THREADS = {MODEL: 1, FINISH: 2}
"""Ray's name for a set of threads is concurrency group: chunks are sampled one by one, and finished beside that."""


def send_by_value() -> None:
    """Afterwards this process sends the modules that a worker needs for its first steps along with what it sends."""
    ray_private.pickle_by_value(sys.modules[__name__], code_module)


class WrongCodeError(Exception):
    """The driver's code is not what a worker would import; the text says what is."""


class WorkerProcess:
    """An actor: one model at a time. The driver's side of it is in ray_pool.py and ray_isolated.py."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._worker: Any = None

    def node(self) -> str:
        """The node where it came to be."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def load(self, arguments: bytes, model: int) -> tuple[str | None, str, str]:
        """Load the plan's model of that number, in place of the one that is there.

        Returned are why it cannot be loaded on this node, or None; the execution class; and the reason once more
        without the node, if it may be the model's own fault. `arguments` are the others of `ray_worker.Worker`,
        pickled: unpickling them needs modules of ours.
        """
        self._worker = None  # one model may fill the memory
        gc.collect()
        try:
            ours = _ray_worker(self._code)  # first: what is unpickled imports modules of ours, which may be others here
            self._worker = ours.Worker(*pickle.loads(arguments), model)  # noqa: S301 - from our own driver
        except _FAULTS as error:
            return _reason(error), "", str(error) if type(error).__name__ == "ModelLoadError" else ""
        return None, self._worker.execution_class, ""

    def sample(self, chunk: int, seconds: float, *, repair: bool) -> Any:
        """See `ray_worker.Worker`."""
        return self._worker.sample(chunk, seconds, repair=repair)

    def finish(self, chunk: int) -> Any:
        """See `ray_worker.Worker`."""
        return self._worker.finish(chunk)

    def alone(self, verb: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        """See `ray_worker.Worker`."""
        return self._worker.alone(verb, seconds, *arguments, **options)

    def stop(self) -> None:
        """No chunk is begun from now on."""
        if self._worker is not None:
            self._worker.stop()


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
