"""`python -m tests.simulator --schedules 10000`: play many schedules; the first that breaks an invariant is shown."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import time

from tests.simulator.schedule import run_schedule
from tests.simulator.world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="the first seed; without it a random one. `--schedules 1` replays it")
    arguments = parser.parse_args()
    logging.disable()  # storage says what it tries again: that is most of what happens here
    first = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    started, outcomes = time.monotonic(), []
    for seed in range(first, first + arguments.schedules):
        try:
            outcomes.append(run_schedule(seed))
        except Violation as violation:
            print(f"{violation}\nreplay: python -m tests.simulator --schedules 1 --seed {seed}")
            return 1
        if len(outcomes) % 1000 == 0:
            print(f"{len(outcomes)} schedules, {len(outcomes) / (time.monotonic() - started):.0f} a second", flush=True)
    seconds = time.monotonic() - started
    totals = {
        name: sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("steps", "kills", "freezes", "faults", "lost", "cleaned", "conflicts", "repaired", "sleepers")
    }
    print(
        f"{len(outcomes)} schedules from seed {first} in {seconds:.0f} s ({len(outcomes) / seconds:.0f} a second), "
        f"0 violations: " + ", ".join(f"{count} {name}" for name, count in totals.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
