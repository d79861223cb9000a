"""latentmill: prompts in, a verified image dataset out.

The repository's root is the package: `latentmill.cli`, `latentmill.jobs`, `latentmill.engine`, `latentmill.configs`.
The names below are for notebooks and scripts (docs/python.md); each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmill.engine import Engine
    from latentmill.jobs.api import open_dataset, plan, run

__all__ = ["Engine", "open_dataset", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("latentmill.engine" if name == "Engine" else "latentmill.jobs.api"), name)
