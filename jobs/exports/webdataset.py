"""Tar files as the library webdataset reads them: the parts of a sample lie side by side, under its key."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence

import pyarrow as pa

from latentmill.jobs.exports.format import ExportFormat, File, Picture, Shard
from latentmill.jobs.exports.json_values import json_rows, to_json


class WebDataset(ExportFormat):
    """`000000.tar`, in a folder of its own for each split where there are several."""

    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """One tar file."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, picture in zip(json_rows(rows), pictures, strict=True):
                _add(tar, picture.name, picture.data)
                _add(tar, f"{picture.key}.json", to_json(row).encode())
                _add(tar, f"{picture.key}.txt", row["prompt"].encode())
        folder = "" if shard.alone else f"{shard.split}/"
        return [(f"{folder}{shard.index:06d}.tar", buffer.getvalue())]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without an owner and a time, so that its bytes are always the same
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


WEBDATASET = WebDataset()
