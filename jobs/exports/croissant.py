"""Croissant metadata (MLCommons, version 1.0): the files with their digests, and the columns of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from latentmill.jobs.exports.format import Written, WrittenFile
from latentmill.jobs.exports.parquet import PICTURE

_PARQUET = "application/x-parquet"
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(written: Written) -> dict[str, Any]:
    """The document, in JSON-LD. Columns of nested types, which it has no word for, are left out."""
    license_ = written.plan.license
    splits = written.files_by_split()
    models = dict.fromkeys(model.name for model in written.plan.models)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "latentmill",
        "description": f"Pictures made by the text-to-image model {', '.join(models)}, each with its row.",
        "version": "1.0.0",
        **({} if license_ is None else {"license": license_}),
        "distribution": [
            *(_file_object(file) for files in splits.values() for file in files),
            *(_file_set(split) for split in splits),
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": split, "name": split, "field": list(_fields(split, written.schema))}
            for split in splits
        ],
    }


def _file_object(file: WrittenFile) -> dict[str, Any]:
    """One file, with its digest."""
    return {
        "@type": "cr:FileObject",
        "@id": file.path,
        "name": file.path,
        "contentUrl": file.path,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": _PARQUET,
        "sha256": file.sha256,
    }


def _file_set(split: str) -> dict[str, Any]:
    """The files of a split, by which its rows are read."""
    includes = f"data/{split}-*.parquet"
    return {"@type": "cr:FileSet", "@id": f"files-{split}", "includes": includes, "encodingFormat": _PARQUET}


def _fields(split: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    files = {"fileSet": {"@id": f"files-{split}"}}
    picture = {"extract": {"column": PICTURE.name}, "transform": {"jsonPath": "bytes"}}
    yield _field(split, PICTURE.name, "sc:ImageObject", files | picture)
    for column in schema:
        kind = _kind(column.type)
        if kind is not None:
            yield _field(split, column.name, kind, files | {"extract": {"column": column.name}})


def _field(split: str, name: str, kind: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{split}/{name}",
        "name": f"{split}/{name}",
        "dataType": kind,
        "source": source,
    }


def _kind(type_: Any) -> str | None:
    kinds = (
        (pa.types.is_boolean, "sc:Boolean"),
        (pa.types.is_integer, "sc:Integer"),
        (pa.types.is_floating, "sc:Float"),
        (pa.types.is_string, "sc:Text"),
        (pa.types.is_large_string, "sc:Text"),
    )
    return next((kind for is_kind, kind in kinds if is_kind(type_)), None)
