"""The table of safety checkers: each rates how unsafe one picture looks. An error is never a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from latentmill.engine.types import EngineError, GenerationResult, ModelSpec, Pixels, SafetyVerdict, UncheckedResult

if TYPE_CHECKING:
    import torch


class SafetyChecker(Protocol):
    """Judges one picture at a time, so that a verdict does not depend on the picture's neighbours.

    It may be asked in any thread, also while the model samples, and in several at once.
    """

    def check(self, pixels: Pixels) -> SafetyVerdict:
        """Judge `(h, w, 3) uint8` RGB. May raise; the caller then fails the sample."""


@dataclass(frozen=True, slots=True)
class CheckerEntry:
    """`module` lies in this folder and has `load(spec, folder, device)`, which gives the checker or raises EngineError.

    A checker that a model brings along needs `folder` within the model's, and reads `files` by their paths there.
    """

    module: str
    folder: str | None = None
    files: tuple[str, ...] = ()


_DEFAULT = "open-nsfw"
CHECKERS: Mapping[str, CheckerEntry] = {
    _DEFAULT: CheckerEntry("open_nsfw"),
    "clip-concepts": CheckerEntry(
        "clip_concepts",
        folder="safety_checker",
        files=(
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
            "feature_extractor/preprocessor_config.json",
        ),
    ),
    "none": CheckerEntry("unchecked"),
}

SAFETY_CHECKERS = ("auto", *CHECKERS)
"""What `ModelSpec.safety` takes."""


def choose_checker(safety: str, folder: Path) -> str:
    """The checker that `ModelSpec.safety` means for the model in `folder`, by name.

    Raises EngineError for a name that is not in the table, and where the model lacks the checker's folder.
    """
    present = [name for name, entry in CHECKERS.items() if entry.folder and (folder / entry.folder).is_dir()]
    if safety == "auto":
        return next(iter(present), _DEFAULT)
    if safety not in CHECKERS:
        raise EngineError(f"safety is {safety!r}; expected one of {', '.join(SAFETY_CHECKERS)}")
    needed = CHECKERS[safety].folder
    if needed and safety not in present:
        raise EngineError(f"safety is {safety!r}, but {folder} has no {needed} folder: add one, or choose {_DEFAULT}")
    return safety


def checker_files(folder: Path) -> dict[str, Path]:
    """The files in a model's folder that its checkers read: they can change a verdict. By relative path."""
    own = [entry for entry in CHECKERS.values() if entry.folder and (folder / entry.folder).is_dir()]
    return {name: folder / name for entry in own for name in entry.files if (folder / name).is_file()}


def load_safety_checker(spec: ModelSpec, folder: Path, device: torch.device) -> SafetyChecker:
    """The checker that `spec.safety` names, for the model in `folder`.

    Raises EngineError if it is not available: nothing replaces it silently.
    """
    entry = CHECKERS[choose_checker(spec.safety, folder)]
    checker: SafetyChecker = import_module(f"{__package__}.{entry.module}").load(spec, folder, device)
    return checker


def judge(checker: SafetyChecker, sampled: UncheckedResult) -> GenerationResult:
    """The result with the checker's verdict. Without a verdict it is failed, and there are no pixels."""
    if sampled.judged is None or sampled.kept is None:
        return _failed(sampled, sampled.error or "there is no picture, and no reason why")
    try:
        verdict: SafetyVerdict | None = checker.check(sampled.judged)
    except Exception as error:  # noqa: BLE001 - whatever a checker raises, its picture must not pass
        return _failed(sampled, f"safety checker raised {type(error).__name__}: {error}")
    if verdict is None:
        return _failed(sampled, "safety checker gave no verdict")
    return GenerationResult(
        pixels=sampled.kept,
        error=None,
        safety=verdict,
        prompt_tokens=sampled.prompt_tokens,
        precision=sampled.precision,
        batch_size=sampled.batch_size,
        batch_slot=sampled.batch_slot,
    )


def _failed(sampled: UncheckedResult, error: str) -> GenerationResult:
    return GenerationResult(
        pixels=None,
        error=error,
        safety=None,
        prompt_tokens=0,
        precision=sampled.precision,
        batch_size=sampled.batch_size,
        batch_slot=sampled.batch_slot,
    )
