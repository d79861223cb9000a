"""Pictures drawn once more from their rows alone, in the bulk run's shape: its batch size, padded, in its slot.

So on the row's execution class the same bits come out, and on another one a picture whose difference is measured.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from latentmill.engine import SAMPLERS, EngineError, GenerationResult
from latentmill.engine.types import Pixels
from latentmill.jobs.chunk_result import describe_fault
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.pictures import decode_png, pixel_sha256
from latentmill.jobs.manifests.fields import FIELDS, FieldError, shorten
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.outputs.rows import Row
from latentmill.jobs.postprocess import finish_pixels
from latentmill.jobs.recipe import Recipe, recipe_of
from latentmill.jobs.slots import draw_in_slots
from latentmill.jobs.spec import MAX_CHUNK
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import ChunkEngine

Outcome = Literal["identical", "same-pixels", "close", "different", "no-picture", "not-made"]
RecipeLoader = Callable[[Recipe, str], ChunkEngine]

TOLERANCE = 1.0
"""Mean difference of a colour value, of 255, that is accepted on another execution class than the row's."""

_SAMPLE_ID = re.compile(r"\d{8,19}", re.ASCII)
_GOOD: frozenset[Outcome] = frozenset(["identical", "same-pixels", "close"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Regenerated:
    """One sample made again, or the reason why not.

    `identical`: the file of the row, to the byte. `same-pixels`: its pixels, encoded otherwise. `close`: another
    picture, as another execution class makes it, within the tolerance. `different`: one beyond it, or on the same class
    any other. `no-picture`: the row has none. `not-made`: there is nothing to compare with, or it cannot be drawn.
    Differences are of colour values, of 255; they are null where there is nothing to measure.
    """

    sample_id: str
    status: str
    outcome: Outcome
    detail: str = ""
    max_difference: int | None = None
    mean_difference: float | None = None
    psnr: float | None = None
    """In dB; null for the same pixels too, whose PSNR is infinite."""
    image: str | None = None
    """The picture of the row, relative to the output."""
    file: str | None = None
    """Where the new picture lies."""

    @property
    def words(self) -> str:
        """The outcome and what was measured, in a few words."""
        measured = ""
        if self.mean_difference:
            measured = f"max {self.max_difference} of 255, mean {self.mean_difference:.4g}, PSNR {self.psnr:.1f} dB"
        return "; ".join(part for part in (self.outcome, measured, self.detail) if part)

    @property
    def good(self) -> bool:
        """Whether it is the bulk run's picture, as far as this machine can make it."""
        return self.outcome in _GOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How pictures are drawn and compared. `batch_size` None: the row's own, as the bulk run drew it.

    `device` auto is the kind of the row, if this machine has it.
    """

    device: str = "auto"
    batch_size: int | None = None
    tolerance: float = TOLERANCE
    load: RecipeLoader = lambda recipe, device: recipe.load(device)


class Redrawer:
    """Makes pictures again, from rows alone: one model at a time, several rows to a batch."""

    def __init__(self, job: Job, drawing: Drawing, target: Storage | None = None) -> None:
        self._job = job
        self._drawing = drawing
        self._target = target
        self.execution_classes: set[str] = set()

    def samples(self, rows: Mapping[int, Row]) -> Iterator[tuple[int, Regenerated]]:
        """What became of each row, in the order in which they are drawn."""
        recipes: dict[Hashable, dict[int, Recipe]] = defaultdict(dict)
        for sample, row in rows.items():
            reason = _lacks_picture(row)
            if reason is not None:
                yield sample, _answer(row, "no-picture", reason)
                continue
            try:
                recipe = self._recipe(row)
            except (JobError, FieldError) as error:
                yield sample, _answer(row, "not-made", str(error))
                continue
            recipes[_model_of(recipe)][sample] = recipe
        for alike in recipes.values():
            yield from self._draw({sample: rows[sample] for sample in alike}, alike)

    def _recipe(self, row: Row) -> Recipe:
        """The row's recipe, as it is drawn here. The row may be a stranger's: its numbers must be those of a job."""
        try:
            recipe = recipe_of(row)
        except (LookupError, TypeError, ValueError) as error:
            raise JobError(f"its row is none that a job writes: {describe_fault(error)}") from error
        for name in ("width", "height", "num_inference_steps", "guidance_scale", "sampler", "eta", "seed"):
            FIELDS[name].parse(getattr(recipe.request, name))
        if recipe.request.strength is not None:
            FIELDS["strength"].parse(recipe.request.strength)
        if not _SAMPLE_ID.fullmatch(row["sample_id"]) or not 0 <= recipe.slot < recipe.batch_size <= MAX_CHUNK:
            raise JobError(
                f"its row is none that a job writes: sample {shorten(row['sample_id'])}, slot {recipe.slot} of "
                f"{recipe.batch_size}"
            )
        if self._drawing.batch_size is not None:
            size = self._drawing.batch_size
            recipe = replace(recipe, batch_size=size, slot=recipe.slot % size)
        device = _device(recipe, self._drawing.device)
        return replace(recipe, dtype="float32") if device == "cpu" and recipe.dtype == "float16" else recipe

    def _draw(self, rows: Mapping[int, Row], recipes: Mapping[int, Recipe]) -> Iterator[tuple[int, Regenerated]]:
        """The rows of one model: it is loaded once, and what cannot be drawn is told of each row."""
        first = next(iter(recipes.values()))
        left = dict(rows)
        try:
            engine, model = self._drawing.load(first, _device(first, self._drawing.device)), first.resolve()
            self.execution_classes.add(engine.execution_class)
            for alike in _by_shape(recipes).values():
                order = list(alike)
                requests = [alike[sample].request for sample in order]
                slots = {place: alike[sample].slot for place, sample in enumerate(order)}
                for place, results in draw_in_slots(engine, requests, slots, first.batch_size):
                    sample = order[place]
                    exact = engine.execution_class == rows[sample]["execution_class"]
                    yield sample, self._compare(left.pop(sample), alike[sample], model, results, exact=exact)
        except Exception as error:  # noqa: BLE001 - the model's, the device's or the store's: other rows may be made
            reason = str(error) if isinstance(error, JobError | EngineError) else describe_fault(error)
            for sample, row in left.items():
                yield sample, _answer(row, "not-made", reason)

    def _compare(
        self, row: Row, recipe: Recipe, model: ResolvedModel, results: Iterator[GenerationResult], *, exact: bool
    ) -> Regenerated:
        """The first result that is the row's picture; on another execution class, the first one."""
        kept: tuple[Pixels, bytes] | None = None
        fault = ""
        for result in results:
            finished = None if result.status == "failed" else finish_pixels(recipe.settings, result)
            if finished is None:
                fault = result.error or "the checker flags it now, and the policy is to drop it"
            else:
                pixels, data = finished.pixels, recipe.file(finished.pixels, model)
                if hashlib.sha256(data).hexdigest() == row["sha256"]:
                    return self._told(row, "identical", data, _NO_DIFFERENCE)
                if pixel_sha256(pixels) == row["pixel_sha256"]:
                    return self._told(row, "same-pixels", data, _NO_DIFFERENCE, "its file is encoded otherwise")
                kept = kept or (pixels, data)
            if not exact:
                break
        if kept is None:
            return _answer(row, "not-made", fault)
        pixels, data = kept
        try:
            original = decode_png(self._job.pictures.read_row(row), (row["width"], row["height"]))
            difference = _difference(pixels, original)
        except (ValueError, JobError) as error:
            url = self._job.storage.url
            detail = f"another picture, and the row's own cannot be read ({error}); latentmill repair {url}"
            return self._told(row, "different", data, None, detail)
        if exact:
            return self._told(row, "different", data, difference, "on the row's own execution class")
        close = difference.mean <= self._drawing.tolerance
        detail = f"drawn on another execution class than the row's {row['execution_class']}"
        return self._told(row, "close" if close else "different", data, difference, detail)

    def _told(
        self, row: Row, outcome: Outcome, data: bytes, difference: _Difference | None, detail: str = ""
    ) -> Regenerated:
        """The answer, once the new picture lies in the target, if there is one."""
        file = None
        if self._target is not None:
            file = f"{row['sample_id']}.png"
            self._target.write(file, data)
        answer = replace(_answer(row, outcome, detail), file=file)
        if difference is None:
            return answer
        return replace(answer, max_difference=difference.most, mean_difference=difference.mean, psnr=difference.psnr)


@dataclass(frozen=True, slots=True)
class _Difference:
    """Of two pictures, in colour values of 255; the PSNR of equal ones is infinite, and None here."""

    most: int
    mean: float
    psnr: float | None


_NO_DIFFERENCE = _Difference(0, 0.0, None)


def _difference(ours: Pixels, theirs: Pixels) -> _Difference:
    apart = np.abs(ours.astype(np.int16) - theirs.astype(np.int16))
    square = float(np.mean(apart.astype(np.float64) ** 2))
    return _Difference(int(apart.max()), float(apart.mean()), 10 * math.log10(255**2 / square) if square else None)


def _answer(row: Row, outcome: Outcome, detail: str) -> Regenerated:
    return Regenerated(
        sample_id=row["sample_id"], status=row["status"], outcome=outcome, detail=detail, image=row["image"]
    )


def _lacks_picture(row: Row) -> str | None:
    """Why there is nothing to make again, or None."""
    if row["status"] == "failed":
        return f"it failed ({row['error']}); the job's own command with --retry-failed tries it again"
    return "it was flagged, and the policy dropped its picture" if row["image"] is None else None


def _model_of(recipe: Recipe) -> Hashable:
    """What recipes share that one loaded engine draws."""
    model = (repr(recipe.model), repr(recipe.merged_loras), recipe.model_sha256)
    return (
        *model,
        recipe.prompt_syntax,
        recipe.long_prompts,
        recipe.safety,
        recipe.safety_threshold,
        recipe.dtype,
        recipe.threads,
        recipe.batch_size,
        recipe.execution,
    )


def _by_shape(recipes: Mapping[int, Recipe]) -> Mapping[Hashable, Mapping[int, Recipe]]:
    """The recipes that may share a batch: of one shape, and of one loop where the model's own sampler draws them."""
    groups: dict[Hashable, dict[int, Recipe]] = defaultdict(dict)
    for sample, recipe in recipes.items():
        request = recipe.request
        groups[request.shape, None if request.sampler in SAMPLERS else request.loop][sample] = recipe
    return groups


def _device(recipe: Recipe, asked: str) -> str:
    """Where it is drawn: `auto` is the kind of device of the row, if this machine has it."""
    if asked != "auto":
        return asked
    if recipe.threads is not None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
