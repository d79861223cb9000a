"""The command `latentmill` as it is, but for the model: drawing costs a fraction of a second and is counted."""

from __future__ import annotations

from latentmill.jobs.runner import run_job
from tests.soak.fake_model import counted_engine

if __name__ == "__main__":
    from latentmill import cli

    assert run_job.__kwdefaults__ is not None
    run_job.__kwdefaults__["engine_factory"] = counted_engine  # the only thing that the command line cannot say
    cli.main()
