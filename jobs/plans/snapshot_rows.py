"""Rows of the manifest snapshot as Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pyarrow as pa

from latentmill.jobs.manifests.fields import Value
from latentmill.jobs.manifests.image_rows import DIGESTS
from latentmill.jobs.manifests.images import PlannedImage
from latentmill.jobs.manifests.validate import CARRIED_PREFIX


class SnapshotRows:
    """A few rows of a part of the snapshot, converted once."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = {
            name: _python_values(table.column(name))
            for name in table.column_names
            if not name.startswith(CARRIED_PREFIX)
        }
        self._carried = [
            _python_values(table.column(name)) for name in table.column_names if name.startswith(CARRIED_PREFIX)
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def images(self, row: int, parameters: Mapping[str, Value]) -> int:
        """How many images the row asks for, of each of its prompts."""
        own = self.get("num_images", row)
        return int(parameters["num_images"] if own is None else own)

    def get(self, name: str, row: int) -> Any:
        """The row's own value; None if it has none."""
        column = self._columns.get(name)
        return None if column is None else column[row]

    def image(self, row: int) -> PlannedImage | None:
        """What the row starts from, if it names an image."""
        place, mask = (self.get(name, row) for name in DIGESTS)
        digest, mask_digest = (self.get(name, row) for name in DIGESTS.values())
        return None if place is None else PlannedImage(place=place, sha256=digest, mask=mask, mask_sha256=mask_digest)

    def carried(self, row: int) -> list[Any]:
        """The values of the columns that are carried through to the dataset, in order."""
        return [column[row] for column in self._carried]


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    if _has_nanoseconds(column.type):
        # datetime stops at microseconds: these stay Arrow scalars, which go back into Arrow as they are
        return [value if value.is_valid else None for value in column]
    return cast(list[Any], column.to_pylist())


def _has_nanoseconds(type_: Any) -> bool:
    return (pa.types.is_temporal(type_) and getattr(type_, "unit", "") == "ns") or any(
        _has_nanoseconds(type_.field(index).type) for index in range(type_.num_fields)
    )
