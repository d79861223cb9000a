"""Damage is healed: what `verify` finds wrong is put back, byte for byte, from what is known.

A picture is made again from its plan, in the batch shape and the slot that its row names, and accepted only if the file
has the row's own digest; parts, captions and manifest are published again from the ledger. The ledger itself and the
plan are what all of this is told from: they cannot be healed, only named. Every write puts one whole object in its
place, so that a repair may be killed anywhere, and two may run at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from latentmill.engine import EngineError
from latentmill.jobs.chunk_result import describe_fault
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.defects import Defect, Kind
from latentmill.jobs.outputs.publish import PART_NAME, load_publication, publish
from latentmill.jobs.outputs.verify import UNSOUND, VerifyProgress, verify
from latentmill.jobs.postprocess import postprocess_sample
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.worker import ChunkGenerator, EngineFactory, load_engine

_PICTURES: frozenset[Kind] = frozenset({"image-missing", "image-damaged"})
_PUBLISHED: frozenset[Kind] = frozenset(
    {"not-published", "publication-stale", "part-damaged", "captions-damaged", "dataset-wrong"}
)
_PLACE = re.compile(r"images/\d{5,}/(\d{8,})-[^/]+/[^/]+", re.ASCII)
_TELLING: Mapping[Kind, str] = {
    "chunk-missing": "run the job's own command again: it makes the chunk",
    "record-damaged": "the ledger is what everything else is told from: restore the record from a copy",
    "record-stray": "it is no record of this job: move it away",
    "repair-wrong": "the ledger is what everything else is told from: restore the record from a copy",
    "row-wrong": "the ledger is what everything else is told from: restore the record from a copy",
    "pixels-changed": "its row contradicts itself: restore the record from a copy",
    "source-unstated": "the file is the one that its row names: restore both from a copy",
    "scores-wrong": "the same `latentmill score` command makes it again",
}
"""Why a defect of the ledger cannot be healed from it, and what can be done."""
_OTHER_BYTES = "made again, its file is another one: the model's code or a library is not what it was for its row"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unhealed:
    """A defect that stays, and why."""

    kind: Kind
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What was found, what was restored, and what was not."""

    out: str
    plan_hash: str
    defects: int
    healed: tuple[Defect, ...]
    unhealed: tuple[Unhealed, ...]
    generated: int
    """Pictures that the model made, those among them that were not accepted too."""

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong any more."""
        return 1 if self.unhealed else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


def repair(
    out_url: str,
    *,
    on_progress: Callable[[VerifyProgress], None] = lambda _: None,
    engine_factory: EngineFactory = load_engine,
) -> RepairReport:
    """Afterwards everything that can be told from plan, ledger and model is as it was written; the rest is named.

    The model is loaded only if a picture is needed. Raises UsageError if the output has no plan.
    """
    found = verify(out_url, on_progress=on_progress)
    healer = _Healer(out_url, found.defects, engine_factory)

    def on_picture(done: int, total: int) -> None:
        read, n_defects = found.bytes_read, len(found.defects)
        on_progress(
            VerifyProgress(
                phase="healing", done=done, total=total, images=healer.generated, bytes=read, defects=n_defects
            )
        )

    healer.pictures(on_picture)
    healer.dataset()
    healer.rest()
    return RepairReport(
        out=found.out,
        plan_hash=found.plan_hash,
        defects=len(found.defects),
        healed=tuple(healer.healed),
        unhealed=tuple(healer.unhealed),
        generated=healer.generated,
    )


class _Healer:
    def __init__(self, out_url: str, defects: Sequence[Defect], engine_factory: EngineFactory) -> None:
        self._job = open_job(out_url)
        self._defects = defects
        self._engine_factory = engine_factory
        self.healed: list[Defect] = []
        self.unhealed: list[Unhealed] = []
        self.generated = 0

    def pictures(self, on_picture: Callable[[int, int], None]) -> None:
        """Put lost and altered pictures back, chunk by chunk."""
        wanted = {defect.path: defect for defect in self._defects if defect.kind in _PICTURES}
        if not wanted:
            return
        total, fault = len(wanted), "no commit record refers to it any more"
        on_picture(0, total)
        chunks = sorted({int(place[1]) for path in wanted if (place := _PLACE.fullmatch(path))})
        for model, of_model in groupby(chunks, self._model_of):
            fault = self._of_model(model, of_model, wanted, lambda: on_picture(total - len(wanted), total)) or fault
        for defect in wanted.values():
            self._leave(defect, fault)

    def _model_of(self, chunk: int) -> int:
        """The model of a chunk, which a damaged place may number beyond the plan."""
        return self._job.plan.model_of(chunk) if chunk < self._job.plan.n_chunks else 0

    def _of_model(
        self, model: int, chunks: Iterable[int], wanted: dict[str, Defect], on_picture: Callable[[], None]
    ) -> str | None:
        """Put back what is wanted of one model's chunks; returns why something could not be, if so."""
        fault = None
        try:
            generator = ChunkGenerator(self._job, engine_factory=self._engine_factory, model=model)
        except (JobError, EngineError) as error:
            return f"the model is not at hand: {error}"
        for chunk in chunks:
            try:
                for path, reason in self._chunk(generator, chunk, wanted):
                    defect = wanted.pop(path)
                    if reason is None:
                        self.healed.append(defect)
                    else:
                        self._leave(defect, reason)
                    on_picture()
            except Exception as error:  # noqa: BLE001 - the model's, the device's or the store's: others may be healed
                fault = (
                    f"it cannot be made again: {str(error) if isinstance(error, JobError) else describe_fault(error)}"
                )
        return fault

    def _chunk(
        self, generator: ChunkGenerator, chunk: int, wanted: Mapping[str, Defect]
    ) -> Iterator[tuple[str, str | None]]:
        """The wanted pictures of a chunk, each with the reason why it could not be put back, or None."""
        record = self._job.ledger.effective(chunk)
        rows = [] if record is None else record.table.to_pylist()
        damaged = {place: row for place, row in enumerate(rows) if row["image"] in wanted}
        here = {place: row for place, row in damaged.items() if row["execution_class"] == generator.execution_class}
        for place in damaged.keys() - here.keys():
            row = damaged[place]
            yield (
                row["image"],
                f"its bits are those of {row['execution_class']}, and this is {generator.execution_class}: "
                f"run the repair there",
            )
        samples = self._job.plan.samples_of_chunk(chunk)
        slots = {place: row["batch_slot"] for place, row in here.items()}
        for place, results in generator.generate_in_slots(chunk, slots):
            row = here[place]
            self.generated += 1
            processed = (
                postprocess_sample(self._job.plan, samples[place], result, generator.execution_class)
                for result in results
            )
            files = (sample.data for sample in processed if sample.data is not None)
            data = next((data for data in files if hashlib.sha256(data).hexdigest() == row["sha256"]), None)
            yield row["image"], _OTHER_BYTES if data is None else self._put(row["image"], data)

    def _put(self, path: str, data: bytes) -> str | None:
        """Afterwards the picture has these bytes, or its old ones for the reason that is returned."""
        try:
            self._job.storage.write(path, data)
        except StorageError as error:
            if isinstance(error.__cause__, IsADirectoryError):
                return "a folder lies in its place: move it away, and run the repair again"
            return f"it is made again, and cannot be put in its place: {error}"
        return None

    def dataset(self) -> None:
        """Publish again, over what is there, if anything published is not as it should be."""
        strays = [defect for defect in self._defects if defect.kind == "part-stray"]
        wanted = [defect for defect in self._defects if defect.kind in _PUBLISHED]
        if not wanted and not strays:
            return
        try:
            self._check_ledger()
            publication = publish(self._job, again=bool(wanted))
        except JobError as error:
            for defect in (*wanted, *strays):
                self._leave(defect, str(error))
            return
        self.healed += wanted
        named = {part.path for part in publication.parts}
        for defect in strays:
            # a driver that is about to publish it looks again afterwards, and writes it again
            if PART_NAME.fullmatch(defect.path) is None:
                self._leave(defect, "it is not a part that was published here; move it away")
                continue
            if defect.path not in named:
                self._job.storage.delete(defect.path)
            self.healed.append(defect)

    def _check_ledger(self) -> None:
        """Raises JobError if the ledger no longer says what was published: the published rows may be the right ones."""
        if any(defect.kind in UNSOUND for defect in self._defects):
            raise JobError("it cannot be published again while the ledger is damaged")
        published, there = load_publication(self._job), self._job.ledger.listing().n_repairs
        if published is not None and published.repairs > there:
            raise JobError(
                f"it includes {published.repairs} repair records and the ledger has {there}: restore them from a copy"
            )

    def rest(self) -> None:
        """Name what is told from nothing else."""
        for defect in self._defects:
            if defect.kind in _TELLING:
                self._leave(defect, f"{defect.detail}; {_TELLING[defect.kind]}")

    def _leave(self, defect: Defect, reason: str) -> None:
        self.unhealed.append(Unhealed(kind=defect.kind, path=defect.path, reason=reason))
