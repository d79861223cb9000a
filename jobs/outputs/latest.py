"""The pointer to the newest dated output: `latest.json` beside all of them, moved forward and never back.

The one object that a job writes outside its OUT, and only because the user's `{date}` asks for it. What it says follows
from a published dataset alone, so that two drivers of one day write the same bytes.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import asdict, dataclass, replace

from latentmill.jobs.dated import PLACEHOLDER, DatedOutput
from latentmill.jobs.outputs.publish import MANIFEST_PATH, MAX_MANIFEST_BYTES, Publication, find_manifest
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_DAYS = 100
"""How far back an earlier output is looked for."""

_POINTER_BYTES = 1 << 20
_LATEST = "latest"
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latest:
    """What the pointer at `pointer` says: where the newest whole dataset is, and what is in it."""

    pointer: str
    out: str
    date: str
    plan_hash: str
    published_at: str
    counts: dict[str, int]

    def to_json(self) -> bytes:
        """The pointer's bytes: the same dataset always gives the same ones."""
        fields = asdict(self)
        del fields["pointer"]
        return (json.dumps({"format": 1, **fields}, indent=2) + "\n").encode()


def point_to_latest(dated: DatedOutput, today: datetime.date | None = None) -> Latest | None:
    """Afterwards the pointer is at this output or a later one; what it says is returned.

    Call it when the output is published without failed samples; None if it is not. There is no lock: each driver
    publishes before it writes here, and after every write looks for a later output that was published meanwhile.
    """
    mine = _published(dated)
    if mine is None:
        return None
    storage = Storage.open(dated.folder)
    current = _read(storage, dated)
    if current is not None and (current.date > mine.date or current == mine):
        return current
    storage.write(dated.pointer, mine.to_json())
    newest = mine
    today = today or datetime.datetime.now(datetime.UTC).date()
    for later in dated.outputs_until(today + datetime.timedelta(1)):  # the clocks of two machines may differ
        published = _published(later)
        if published is not None:
            storage.write(dated.pointer, published.to_json())
            newest = published
    return newest


def named_night(place: str) -> DatedOutput | None:
    """The dated output that a place stands for: `.../latest` is the one that the pointer there names.

    So does the pointer's own name, and an output whose name has a day in it is itself. None for any other place. The
    pointer is trusted with a day only: the output lies in the pointer's own folder.
    """
    folder, slash, name = place.rstrip("/").removesuffix(".json").rpartition("/")
    around = folder + slash
    day = _DAY.search(name)
    if day is not None and _is_day(day[0]):
        return DatedOutput(template=around + name.replace(day[0], PLACEHOLDER), date=day[0])
    if _LATEST not in name:
        return None
    dated = DatedOutput(template=around + name.replace(_LATEST, PLACEHOLDER), date="")
    pointed = _read(Storage.open(dated.folder), dated)
    return None if pointed is None else replace(dated, date=pointed.date)


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def night_before(dated: DatedOutput) -> DatedOutput | None:
    """The newest published output of an earlier day; None if there is none in the last hundred days."""
    for earlier in dated.outputs_before(MAX_DAYS):
        if Storage.open(earlier.out).exists(MANIFEST_PATH):
            return earlier
    return None


def _published(dated: DatedOutput) -> Latest | None:
    """What the pointer should say of an output; None if it has no dataset, or one with failed samples."""
    storage = Storage.open(dated.out)
    try:
        manifest = find_manifest(storage)
        publication = Publication.from_json(storage.read(manifest, MAX_MANIFEST_BYTES))
        published = datetime.datetime.fromtimestamp(storage.modified(manifest), datetime.UTC)
    except (FileNotFoundError, ValueError):
        return None
    if publication.counts["failed"]:
        return None
    return Latest(
        pointer=_pointer_url(dated),
        out=_absolute(dated.out),
        date=dated.date,
        plan_hash=publication.plan_hash,
        published_at=published.isoformat(timespec="seconds"),
        counts=publication.counts,
    )


def _read(storage: Storage, dated: DatedOutput) -> Latest | None:
    """What the pointer says; None if there is none, or something else in its place."""
    try:
        fields = json.loads(storage.read(dated.pointer, _POINTER_BYTES))
        if fields.pop("format") != 1:
            return None
        datetime.date.fromisoformat(fields["date"])
        return Latest(pointer=_pointer_url(dated), **fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _pointer_url(dated: DatedOutput) -> str:
    return f"{_absolute(dated.folder)}/{dated.pointer}"


def _absolute(url: str) -> str:
    return display_url(url) if "://" in url else allowed_filesystem(url)[1]
