"""An output that has a plan: everything that a worker, a publisher or a reader needs to find its way in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentmill.jobs.errors import UsageError
from latentmill.jobs.ledger.ledger import Ledger
from latentmill.jobs.ledger.picture_store import PictureStore
from latentmill.jobs.plans.plan import Plan, load_plan
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Other outputs that a run takes cells from, and whether their files are linked or copied (jobs/reuse.py)."""

    donors: tuple[str, ...] = ()
    link: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What belongs together for one output. `url` is the output as it was named, perhaps with credentials in it."""

    url: str = field(repr=False)
    storage: Storage
    plan: Plan
    ledger: Ledger
    pictures: PictureStore
    reuse: Reuse = field(default_factory=Reuse, repr=False)


def open_job(out_url: str) -> Job:
    """The job that lives in an output, read now. Raises UsageError if it has no plan or cannot be read."""
    try:
        storage = Storage.of_output(out_url)
        plan = load_plan(storage)
    except StorageError as error:
        raise UsageError(str(error)) from error
    ledger = Ledger(
        storage=storage,
        plan_hash=plan.plan_hash,
        n_chunks=plan.n_chunks,
        schema=plan.record_schema.remove_metadata(),
        chunk_size=plan.settings.chunk_size,
    )
    return Job(url=out_url, storage=storage, plan=plan, ledger=ledger, pictures=PictureStore(storage))
