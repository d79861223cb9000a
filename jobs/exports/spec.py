"""What an export is asked for: its settings, each declared once, as flags and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.exports.table import EXPORTS, IMAGE_FORMATS, RUNNERS
from latentmill.jobs.manifests.fields import FieldError, shorten
from latentmill.jobs.settings import choice, settings_of, special, switch, text, whole
from latentmill.jobs.store.urls import allowed_filesystem

WHAT = "What is exported"
HOW = "How it is written (never changes a byte)"

SIGNED = "Content credentials (C2PA)"

PICTURED = ("ok", "flagged")
"""The statuses whose samples may have a picture."""

MOST_ROWS, MOST_BYTES = 50_000, 1_000_000_000
"""Of one shard."""

_UNITS = {"kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


def _to(name: str, value: Any) -> str:
    if value not in EXPORTS:
        raise FieldError(f"{name} {shorten(value)} does not exist; there is {', '.join(EXPORTS)}")
    return str(value)


def _out(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(f"{name} is {shorten(value)}, expected a folder or a URL")
    allowed_filesystem(value)
    return value


def _status(name: str, value: Any) -> str:
    named = [part.strip() for part in str(value).split(",")]
    unknown = next((part for part in named if part not in PICTURED), None)
    if unknown is not None:
        raise FieldError(
            f"{name} {shorten(unknown)} cannot be exported; give {' or '.join(PICTURED)}, or both: {','.join(PICTURED)}"
        )
    return ",".join(part for part in PICTURED if part in named)


def _split(name: str, value: Any) -> str:
    shares = {}
    for part in str(value).split(","):
        found = re.fullmatch(r"\s*([A-Za-z]\w{0,31})=(\d*\.?\d+)\s*", part, re.ASCII)
        if found is None or not 0 < float(found[2]) <= 1 or found[1] in shares:
            raise FieldError(f"{name} is {shorten(value)}, expected names with their shares: train=0.9,test=0.1")
        shares[found[1]] = found[2]
    if not math.isclose(sum(map(float, shares.values())), 1, abs_tol=1e-9):
        raise FieldError(f"{name} {shorten(value)} adds up to {sum(map(float, shares.values())):g}; it must be 1")
    return ",".join(f"{split}={share}" for split, share in shares.items())


def _shard_size(name: str, value: Any) -> str:
    found = re.fullmatch(r"([1-9]\d{0,12})(kB|MB|GB)?", str(value))
    if found is None:
        raise FieldError(f"{name} is {shorten(value)}, expected rows or bytes: 10000, 500MB")
    most, limit = (MOST_BYTES, _UNITS[found[2]]) if found[2] else (MOST_ROWS, 1)
    if int(found[1]) * limit > most:
        raise FieldError(f"{name} {shorten(value)} is too large; a shard has up to {MOST_ROWS:,} rows and 1GB")
    return found[0]


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """One export. What is `planned` can change a byte of it: an export that has begun is gone on with as it was."""

    to: str = special(WHAT, f"The form: {', '.join(EXPORTS)}.", _to, planned=True)
    out: str = special(WHAT, "Folder or URL (s3://...) of the export: empty, or the same export, begun.", _out)
    image_format: str = choice("png", WHAT, f"{', '.join(IMAGE_FORMATS)}.", tuple(IMAGE_FORMATS), planned=True)
    image_quality: int | None = whole(
        None, WHAT, "Of webp, which is lossless without it, and of jpeg (95).", 1, 100, planned=True
    )
    status: str = special(WHAT, "ok, flagged or ok,flagged.", _status, default="ok", planned=True)
    filter: str | None = text(
        None, WHAT, "Only rows for which this holds: 'nsfw_score < 0.2 and \"cat\" in prompt'.", planned=True
    )
    split: str | None = special(
        WHAT, "NAME=SHARE,...: train=0.9,test=0.1, by row_id.", _split, default=None, planned=True
    )
    shard_size: str = special(
        WHAT, "Rows or bytes of a shard: 10000, 500MB.", _shard_size, default="256MB", planned=True
    )
    executor: str = choice("threads", HOW, "threads of this process, or ray.", tuple(RUNNERS))
    address: str | None = text(
        None, HOW, "Ray cluster, HOST:6379; default RAY_ADDRESS, else one on this machine. Its nodes reach both places."
    )
    insecure_ray: bool = switch(HOW, "Join a cluster without token authentication: anyone can run code on it.")
    workers: int | None = whole(
        None, HOW, "Shards at work at once, each held in memory: 4, on Ray one for each CPU.", 1, 10_000
    )
    verify: bool = switch(HOW, "Read what is there already, and compare its digests; otherwise its sizes are compared.")

    sign: str | None = text(
        None, SIGNED, "PEM file of the certificates to sign with, the signer's own first; needs latentmill[c2pa]."
    )
    key: str | None = text(None, SIGNED, "PEM file of its private key. On Ray, each node reads both files itself.")
    sign_prompt: bool = switch(SIGNED, "Put prompt and negative prompt into the credentials, which say neither else.")
    timestamp_url: str | None = text(
        None, SIGNED, "Time-stamping server (RFC 3161), asked once for each picture: http://...", pattern="https?://.+"
    )

    @property
    def splits(self) -> Mapping[str, float]:
        """The names of the splits with their shares: one, if none are asked for."""
        if self.split is None:
            return {"train": 1.0}
        return {name: float(share) for name, _, share in (part.partition("=") for part in self.split.split(","))}

    @property
    def shard_limits(self) -> tuple[int, int]:
        """The most rows of a shard, and the most bytes of its pictures."""
        number, unit = self.shard_size.rstrip("kMGB"), self.shard_size.lstrip("0123456789")
        return (MOST_ROWS, int(number) * _UNITS[unit]) if unit else (int(number), MOST_BYTES)

    def planned(self) -> dict[str, Any]:
        """The settings that can change a byte of it."""
        return {name: getattr(self, name) for name, setting in EXPORT_SETTINGS.items() if setting.planned}


EXPORT_SETTINGS = settings_of(ExportSpec)


def make_export_spec(values: Mapping[str, Any]) -> ExportSpec:
    """The export of these settings, each checked. Raises UsageError that names what is wrong with one of them."""
    try:
        given = {name: EXPORT_SETTINGS[name].parse(name, value) for name, value in values.items() if value is not None}
    except FieldError as error:
        raise UsageError(str(error)) from None
    for name, remedy in (("to", f"one of {', '.join(EXPORTS)}"), ("out", "a folder or a URL of the export")):
        if name not in given:
            raise UsageError(f"--{name} is not given; give {remedy}")
    spec = ExportSpec(**given)
    if (spec.sign is None) != (spec.key is None) or (spec.sign is None and (spec.sign_prompt or spec.timestamp_url)):
        raise UsageError("signing takes a certificate and its key; give both --sign and --key")
    if spec.image_quality is not None and not IMAGE_FORMATS[spec.image_format].quality:
        raise UsageError(
            f"image_quality {spec.image_quality} has no meaning for {spec.image_format}; leave it out, or choose "
            f"{' or '.join(name for name, entry in IMAGE_FORMATS.items() if entry.quality)}"
        )
    return spec
