"""The command `latentmill` as it is, and each load of a model leaves a line: which process loaded which model."""

from __future__ import annotations

import os
from pathlib import Path

from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.runner import run_job
from latentmill.jobs.worker import ChunkEngine, load_engine

LOADS = "LATENTMILL_SOAK_LOADS"
"""The variable that names the file."""


def noted_engine(plan: Plan, device: str) -> ChunkEngine:
    """The engine factory: the real model."""
    with Path(os.environ[LOADS]).open("a") as notes:
        notes.write(f"{os.getpid()} {plan.model.name}\n")
    return load_engine(plan, device)


if __name__ == "__main__":
    from latentmill import cli
    from tests.soak import noted_driver

    assert run_job.__kwdefaults__ is not None
    run_job.__kwdefaults__["engine_factory"] = noted_driver.noted_engine  # as workers import it
    cli.main()
