"""One seed, one schedule: disturbed drivers, crews and cleaners, then a last undisturbed run and the audit."""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentmill.jobs.outputs.clean import GRACE_SECONDS
from latentmill.jobs.runner import RunSummary
from tests.simulator.cast import Cast, installed
from tests.simulator.invariants import Watch, check_cleaned, check_end
from tests.simulator.plans import PLANS, SimulatedPlan
from tests.simulator.reading import standing_plan
from tests.simulator.world import Violation, Weather, World, digest

CALM = Weather(fault=0.0, refusal=0.0, kill=0.0, freeze=0.0)
_TRACE_SHOWN = 60


@dataclass(frozen=True)
class Outcome:
    """What happened in a schedule. `trace` is the digest of every event: equal digests, equal schedules.

    `lost` attempts were finished and outrun by another, `cleaned` images were deleted, `conflicts` are drivers refused.
    `repaired` counts repair records, `sleepers` manifests that were older than the ledger when they were written.
    """

    seed: int
    steps: int
    kills: int
    freezes: int
    faults: int
    lost: int
    cleaned: int
    conflicts: int
    repaired: int
    sleepers: int
    trace: str


def run_schedule(seed: int) -> Outcome:
    """Play one schedule and audit it. Raises Violation, which names the seed and shows the last events."""
    chooser = random.Random(f"weather {seed}")
    weather = Weather(
        fault=chooser.choice([0.0, 0.05, 0.2, 0.4]),
        refusal=chooser.choice([0.0, 0.0, 0.05]),
        kill=chooser.choice([0.0, 0.002, 0.01, 0.03]),
        freeze=chooser.choice([0.0, 0.005, 0.02]),
    )
    world = World(seed, weather)
    cast = Cast(world)
    watch = Watch(world)
    try:
        with installed(world, cast):
            try:
                _play(world, cast, chooser)
            finally:
                world.stop()
    except Exception as error:
        events = "\n  ".join(world.trace[-_TRACE_SHOWN:])
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}\n  {events}") from error
    return Outcome(
        seed=seed,
        steps=world.steps,
        kills=world.kills,
        freezes=world.freezes,
        faults=world.faults,
        lost=cast.lost,
        cleaned=cast.cleaned,
        conflicts=cast.conflicts,
        repaired=cast.repaired,
        sleepers=watch.sleepers,
        trace=digest(world.trace),
    )


def first_violation(seeds: range) -> tuple[int, Violation] | None:
    """How many schedules it took until one broke an invariant, and how; None if none did."""
    for number, seed in enumerate(seeds, start=1):
        try:
            run_schedule(seed)
        except Violation as violation:
            return number, violation
    return None


def _play(world: World, cast: Cast, chooser: random.Random) -> None:
    favourite = chooser.choice(PLANS)
    retries = chooser.choice([0.0, 0.5, 0.9])
    for _ in range(chooser.choice([2, 2, 3])):
        plan = favourite if chooser.random() < 0.85 else chooser.choice(PLANS)
        retry, after = chooser.random() < retries, chooser.uniform(0, chooser.choice([3, 30]))
        cast.driver(plan, retry=retry, lives=chooser.randint(1, 4), after=after)
    for _ in range(chooser.randint(0, 2)):
        cast.cleaner(chooser.randint(1, 6), longest_pause=chooser.choice([0.5, 2.0, 200_000.0]))
    world.run()

    world.weather = CALM
    plan = standing_plan(world.store.objects) or favourite
    _run_undisturbed(world, cast, plan)
    check_end(world, plan)
    if retries:
        cast.heals = 1.0
        if _run_undisturbed(world, cast, plan, retry=True).exit_code:
            raise Violation("I9: every sample was healed, and the exit code says that some failed")
        check_end(world, plan)

    before = dict(world.store.objects)
    if _run_undisturbed(world, cast, plan, retry=bool(retries)).generated or world.store.objects != before:
        raise Violation("I8: a finished job was run again, and something was generated or changed")
    world.now += 2 * GRACE_SECONDS
    cast.cleaner(1, longest_pause=1.0, mortal=False)
    world.run()
    check_end(world, plan)
    check_cleaned(world)


def _run_undisturbed(world: World, cast: Cast, plan: SimulatedPlan, *, retry: bool = False) -> RunSummary:
    cast.summaries.clear()
    cast.driver(plan, retry=retry, mortal=False)
    world.run()
    if not cast.summaries:
        raise Violation("I9: an undisturbed driver did not finish")
    return cast.summaries[0]
