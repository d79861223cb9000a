"""One of the two datasets that are compared: its rows in batches or by their places, and their pictures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.picture_store import LostPictureError
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.outputs.publish import Part, read_columns, standing_publication
from latentmill.jobs.plans.option_columns import option_fields

BATCH_ROWS = 4096


class Side:
    """A published dataset. Memory holds two of its parts; pictures may be read by several threads."""

    def __init__(self, out: str) -> None:
        self.job = open_job(out)
        self.url = self.job.storage.url
        publication = standing_publication(self.job)
        if publication is None:
            raise JobError(
                f"{self.url} has no published dataset, and only such are compared; `latentmill status {self.url}` "
                f"shows how far it is, and the same `latentmill run` command goes on with it"
            )
        self.publication = publication
        plan = self.job.plan
        self._own = {field.name for field in (*plan.columns, *option_fields(plan.model))}
        self._absent = {"model": plan.model.source, "loras": ""}
        self._ends = list(accumulate(part.rows for part in publication.parts))
        self._read = lru_cache(maxsize=2)(self._read_part)

    def has(self, column: str) -> bool:
        """Whether rows have this column of ours, and not one of the manifest's that is called so."""
        return column in self._own

    def batches(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """All rows in order, some thousands at a time. A column that they lack says what holds for all of them."""
        for part in self.publication.parts:
            table = self._read_part(part, tuple(names))
            for start in range(0, table.num_rows, BATCH_ROWS):
                yield table.slice(start, BATCH_ROWS)

    def rows(self, numbers: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """The rows at these places, in their order; each part that has some of them is read once."""
        found: dict[int, dict[str, Any]] = {}
        for index, group in groupby(sorted(set(numbers)), key=lambda number: bisect_right(self._ends, number)):
            part, wanted = self.publication.parts[index], list(group)
            first = self._ends[index] - part.rows
            table = self._read(part, tuple(names)).take(pa.array([number - first for number in wanted]))
            found.update(zip(wanted, table.to_pylist(), strict=True))
        return [found[number] for number in numbers]

    def file(self, row: Mapping[str, Any]) -> bytes:
        """The file of a row's picture, which has the digest of the row. Raises JobError otherwise."""
        try:
            return self.job.pictures.read_row(row)
        except LostPictureError as error:
            raise JobError(self._refusal(row, str(error))) from error

    def picture(self, row: Mapping[str, Any]) -> Pixels:
        """The pixels of a row's picture. Raises JobError if it is not as its row says."""
        try:
            return decode_png(self.file(row), (row["width"], row["height"]))
        except ValueError as error:
            raise JobError(self._refusal(row, str(error))) from error

    def _refusal(self, row: Mapping[str, Any], why: str) -> str:
        return f"{row['image']} in {self.url} cannot be compared: {why}; heal it by: latentmill repair {self.url}"

    def _read_part(self, part: Part, names: tuple[str, ...]) -> pa.Table:
        try:
            table = read_columns(self.job, part, [name for name in names if self.has(name)])
        except FileNotFoundError as error:
            raise JobError(
                f"{part.path} in {self.url} is gone: it was published anew meanwhile, or lost; run the same command "
                f"again, or heal it by: latentmill repair {self.url}"
            ) from error
        for name in names:
            if not self.has(name):
                table = table.append_column(name, pa.repeat(pa.scalar(self._absent.get(name), pa.string()), part.rows))
        return table
