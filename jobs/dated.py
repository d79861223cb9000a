"""A job that runs every day: `{date}` in its output's name, and where the pointer to the newest output lies."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.store.urls import display_url

PLACEHOLDER = "{date}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatedOutput:
    """One day's output of a template such as `s3://bucket/sweep/{date}`; `date` is YYYY-MM-DD."""

    template: str
    date: str

    @property
    def out(self) -> str:
        """The output of this day."""
        return self.template.replace(PLACEHOLDER, self.date)

    @property
    def folder(self) -> str:
        """What holds the outputs of all days, and the pointer."""
        folder, slash, _ = self.template.rpartition("/")
        return folder or slash or "."

    @property
    def pointer(self) -> str:
        """The pointer's name: `latest.json`, or `sweep-latest.json` for `sweep-{date}`."""
        return self.template.rpartition("/")[2].replace(PLACEHOLDER, "latest") + ".json"

    def outputs_until(self, last: datetime.date) -> list[DatedOutput]:
        """The outputs of the days after this one, up to `last`."""
        first = datetime.date.fromisoformat(self.date)
        days = range(1, (last - first).days + 1)
        return [DatedOutput(template=self.template, date=str(first + datetime.timedelta(day))) for day in days]

    def outputs_before(self, days: int) -> Iterator[DatedOutput]:
        """The outputs of the days before this one, the newest first."""
        day = datetime.date.fromisoformat(self.date)
        for ago in range(1, days + 1):
            yield DatedOutput(template=self.template, date=str(day - datetime.timedelta(ago)))


def dated_output(out: str, date: object = None, today: datetime.date | None = None) -> DatedOutput | None:
    """The output that a name with a placeholder stands for: on `date`, else on `today`, by default the day in UTC.

    None for a name without one. Raises UsageError for any other placeholder, for one that is not in the last part of
    the name, and for a date without a placeholder.
    """
    shown = display_url(out)
    if "{" not in out and "}" not in out:
        if date is not None:
            raise UsageError(f"date is {shorten(str(date))}, but out {shown!r} has no {PLACEHOLDER}; leave it out")
        return None
    rest = out.replace(PLACEHOLDER, "")
    if "{" in rest or "}" in rest:
        raise UsageError(f"out {shown!r}: the only placeholder is {PLACEHOLDER}, a day as YYYY-MM-DD")
    template = out.rstrip("/")
    folder, _, name = template.rpartition("/")
    if PLACEHOLDER in folder or PLACEHOLDER not in name or folder.endswith(":/"):
        raise UsageError(
            f"out {shown!r}: {PLACEHOLDER} belongs into the last part, below a folder that is the same every day, as "
            f"in s3://bucket/sweep/{PLACEHOLDER}"
        )
    day = today or datetime.datetime.now(datetime.UTC).date() if date is None else _day(str(date))
    return DatedOutput(template=template, date=day.isoformat())


def _day(text: str) -> datetime.date:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise UsageError(f"date {shorten(text)} is no day; write it as YYYY-MM-DD") from None
