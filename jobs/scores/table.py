"""The table of scorers: what `latentmill score --with` names. Other packages add theirs by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import nearest, shorten

if TYPE_CHECKING:
    from latentmill.jobs.scores.scorer import Scorer
    from latentmill.jobs.scores.spec import ScoreSpec

GROUP = "latentmill.scorers"
"""The group of entry points whose names are scorers and whose values are their classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerEntry:
    """One scorer. `place` names a module of this folder and the class in it; `what` says what its columns hold."""

    place: str
    what: str


SCORERS: Mapping[str, ScorerEntry] = {
    "sharpness": ScorerEntry(
        place="sharpness.Sharpness",
        what="`sharpness`: the variance of the Laplacian of the grey picture; small for what is blurred or empty",
    ),
    "phash": ScorerEntry(
        place="phash.PerceptualHash",
        what="`phash`: 64 bits of the picture's lowest frequencies, as the library imagehash has them; near duplicates "
        "are told",
    ),
    "embedding": ScorerEntry(
        place="embedding.Embedding",
        what="`embedding_hash`: 64 bits of the picture's embedding by EfficientNet-Lite0; near duplicates are told, "
        "also where one is cut, turned a little or mirrored; needs `latentmill[embedding]`",
    ),
    "text": ScorerEntry(
        place="text.WrittenText",
        what="`text`: the words that are read in the picture by rapidocr; `text_share`: the share of the picture that "
        "they cover; needs `latentmill[text]`",
    ),
    "clip": ScorerEntry(
        place="clip.Clip",
        what="`clip_score`: the cosine of picture and prompt by the CLIP model at `--clip-model`",
    ),
}


def load_scorers(names: Sequence[str], spec: ScoreSpec) -> list[Scorer]:
    """The scorers of these names, ready to work. Raises UsageError for one that does not exist or cannot be loaded."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"the scorer {shorten(repeated)} is named twice; name it once")
    return [_load(name, spec) for name in names]


def _load(name: str, spec: ScoreSpec) -> Scorer:
    from latentmill.jobs.scores.scorer import check_identity

    plugged = [point for point in entry_points(group=GROUP) if point.name == name]
    if len(plugged) + (name in SCORERS) > 1:
        owners = ", ".join(sorted(_owner(point) for point in plugged))
        raise UsageError(f"there are several scorers {shorten(name)}, also by {owners}; uninstall all but one")
    scorer_class = _plugged_class(plugged[0]) if plugged else _own_class(name)
    scorer = scorer_class.load(spec) if hasattr(scorer_class, "load") else scorer_class()
    try:
        if scorer.name != name:
            raise ValueError(f"it calls itself {shorten(scorer.name)}")
        check_identity(scorer.name, scorer.version, scorer.columns)
        hashes = getattr(scorer, "hash_column", None)
        if hashes is not None and scorer.columns.get(hashes) != "string":
            raise ValueError(f"its hash_column {shorten(hashes)} is no column of the type string")
    except (AttributeError, ValueError) as error:
        raise UsageError(f"the scorer {shorten(name)} is none: {error}; correct it") from error
    return cast("Scorer", scorer)


def _own_class(name: str) -> Any:
    if name not in SCORERS:
        known = [*SCORERS, *sorted({point.name for point in entry_points(group=GROUP)} - set(SCORERS))]
        raise UsageError(
            f"the scorer {shorten(name)} does not exist{nearest(name, known)}; there is {', '.join(map(str, known))}"
        )
    module, _, attribute = SCORERS[name].place.partition(".")
    return getattr(import_module(f"latentmill.jobs.scores.{module}"), attribute)


def _plugged_class(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # the code of another package may raise anything
        raise UsageError(
            f"the scorer {shorten(point.name)} of {_owner(point)} cannot be loaded: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; mend or uninstall it"
        ) from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
