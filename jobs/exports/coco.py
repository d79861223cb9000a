"""COCO captions: pictures in folders, and for each split one file of annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from latentmill.jobs.exports.format import ExportFormat, File, Picture, Shard, Written
from latentmill.jobs.exports.json_values import to_json

_PIECES = "_export/captions/"
_COLUMNS = ("sample_id", "prompt", "width", "height", "sha256", "exported_sha256")


class CocoCaptions(ExportFormat):
    """`images/train/00000/KEY.png`, and `annotations/captions_train.json`, which is made of the shards' own pieces."""

    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """The pictures, then a piece of the annotations."""
        images, annotations = [], []
        for row, picture in zip(rows.select(list(_COLUMNS)).to_pylist(), pictures, strict=True):
            name = f"{shard.folder}/{picture.name}"
            yield f"images/{name}", picture.data
            number = int(row["sample_id"]) + 1  # 0 stands for no match in COCO's own tools
            annotations.append({"id": number, "image_id": number, "caption": row.pop("prompt")})
            images.append({"id": number, "file_name": name, **row})
        piece = {"images": images, "annotations": annotations}
        yield f"{_PIECES}{shard.name}.json", to_json(piece).encode()

    def last_files(self, written: Written) -> Iterable[File]:
        """The annotations of each split."""
        for split, files in written.files_by_split().items():
            whole: dict[str, list[Any]] = {"images": [], "annotations": []}
            for file in files:
                if file.path.startswith(_PIECES):
                    piece = json.loads(written.read(file.path))
                    for name, entries in whole.items():
                        entries.extend(piece[name])
            info = {"description": "Pictures made by a text-to-image model", "version": written.plan.plan_hash}
            license_ = written.plan.license
            licenses = [] if license_ is None else [{"id": 1, "name": license_, "url": ""}]
            document = {"info": info, "licenses": licenses, **whole}
            yield f"annotations/captions_{split}.json", to_json(document).encode()


COCO_CAPTIONS = CocoCaptions()
