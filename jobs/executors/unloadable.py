"""Models of a job that cannot be loaded: they cost their own samples, unless no model can be loaded at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.worker import commit_unmade


class Unloadable:
    """The models that could not be loaded in this run, with the reasons, and the chunks that wait for the outcome.

    Some are known by the plan.
    """

    def __init__(self, job: Job) -> None:
        self.reasons = {number: model.fault for number, model in enumerate(job.plan.models) if model.fault is not None}
        self._job = job
        self._chunks: list[int] = []
        self._any_loaded = False

    def note_loaded(self) -> None:
        """A model was loaded: the machine is not what is wrong with the others."""
        self._any_loaded = True

    def note_failed(self, model: int, reason: str) -> None:
        """That model could not be loaded. Raises JobError if it is the job's only one."""
        if len(self._job.plan.models) == 1:
            raise JobError(reason)
        self.reasons.setdefault(model, reason)

    def put(self, chunks: Iterable[int]) -> None:
        """These cannot be made by their model."""
        self._chunks += chunks

    def commit(self, *, repair: bool) -> Iterator[ChunkResult]:
        """Afterwards these chunks are committed as failed. Raises JobError if no model has been loaded, ever."""
        if self._chunks and not self._any_loaded and not self._others_were_drawn():
            raise JobError(f"no model of the job can be loaded; the first: {next(iter(self.reasons.values()))}")
        while self._chunks:
            chunk = self._chunks.pop()
            reason = self.reasons[self._job.plan.model_of(chunk)]
            yield commit_unmade(self._job, chunk, reason, repair=repair)

    def _others_were_drawn(self) -> bool:
        """Whether an earlier run has committed chunks of another model."""
        committed = self._job.ledger.committed()
        first_chunks = {section.groups[0].model: section.first_chunk for section in self._job.plan.grid.sections}
        return any(committed[chunk] for model, chunk in first_chunks.items() if model not in self.reasons)
