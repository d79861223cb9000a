"""What `latentmill score` is asked for beside the names of scorers: its settings, each declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FieldError
from latentmill.jobs.settings import choice, settings_of, switch, text, whole
from latentmill.jobs.spec import DEVICES

MAX_DISTANCE = 16
SCORING = "How pictures are scored"
RUNNING = "Where they are scored"


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """How pictures are scored."""

    clip_model: str | None = text(None, SCORING, "For clip: the folder or URL of a CLIP model, as transformers has it.")
    device: str = choice("auto", SCORING, "Where models of scorers run: auto, cpu or cuda.", DEVICES)
    distance: int = whole(
        4, SCORING, "Bits in which the hashes of pictures that count as near duplicates may differ.", 0, MAX_DISTANCE
    )
    executor: str = choice("threads", RUNNING, "threads of this process, or ray.", ("threads", "ray"))
    address: str | None = text(
        None, RUNNING, "Ray cluster, HOST:6379; default RAY_ADDRESS, else one on this machine. Its nodes reach OUT."
    )
    insecure_ray: bool = switch(RUNNING, "Join a cluster without token authentication: anyone can run code on it.")
    workers: int | None = whole(
        None, RUNNING, "On Ray, parts at work at once: one for each CPU, or GPU where a scorer uses it.", 1, 10_000
    )
    replace: bool = switch(SCORING, "Replace scores of another version of a scorer, which are refused otherwise.")


SCORE_SETTINGS = settings_of(ScoreSpec)


def make_score_spec(values: Mapping[str, Any]) -> ScoreSpec:
    """These settings, each checked. Raises UsageError that names what is wrong with one of them."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return ScoreSpec(**{name: SCORE_SETTINGS[name].parse(name, value) for name, value in given.items()})
    except FieldError as error:
        raise UsageError(str(error)) from None
