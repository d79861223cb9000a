"""The table of manifest formats: everything that is said of formats elsewhere follows from it."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.formats import CHOICES, FORMATS, SUFFIXES, formats_of, suffix_like
from latentmill.jobs.manifests.manifest import open_manifest
from latentmill.jobs.manifests.readers import Reader
from latentmill.jobs.spec import SETTINGS


def example(name: str) -> bytes:
    """A manifest of this format with one row, the prompt `a cat`."""
    if name in {"csv", "tsv"}:
        text = io.StringIO()
        csv.writer(text, delimiter="," if name == "csv" else "\t").writerows([["tag", "prompt"], ["x", "a cat"]])
        return text.getvalue().encode()
    if name == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["a cat"]}), sink)
        return sink.getvalue()
    if name == "png":
        info, sink = PngImagePlugin.PngInfo(), io.BytesIO()
        info.add_text("parameters", "a cat\nSteps: 3, CFG scale: 2, Seed: 1")
        Image.new("RGB", (2, 2)).save(sink, "PNG", pnginfo=info)
        return sink.getvalue()
    return {
        "lines": b"a cat\n",
        "parameters": b"a cat\nNegative prompt: a dog\nSteps: 3, CFG scale: 2, Seed: 1\n",
        "flags": b'--prompt "a cat" --seed 3\n',
        "jsonl": json.dumps({"prompt": "a cat"}).encode(),
        "json": b'["a cat"]',
    }[name]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_every_format_is_read_and_compressed_where_the_table_says_so(tmp_path, name, gzipped):
    entry = FORMATS[name]
    assert isinstance(entry.reader, Reader)
    for suffix in entry.suffixes:
        path = tmp_path / f"m.{suffix}{'.gz' if gzipped else ''}"
        path.write_bytes(gzip.compress(example(name)) if gzipped else example(name))
        chosen = name if name in CHOICES else "auto"
        if gzipped and not entry.gzip:
            with pytest.raises(UsageError, match=rf"known are .* and \.gz of all but .*\.{suffix}"):
                open_manifest([str(path)], chosen)
            continue
        (source,) = open_manifest([str(path)], chosen).sources
        assert [list(batch.columns["prompt"]) for batch in source.batches() if len(batch)] in (
            [["a cat"]],
            [[pa.scalar("a cat")]],
        )


@pytest.mark.parametrize("name", FORMATS)
def test_the_start_of_a_file_leads_to_its_suffix_or_to_the_refusal_that_names_its_format(tmp_path, name):
    suffix = FORMATS[name].suffixes[0]
    assert suffix_like(example(name)) == suffix
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(example(name))
    if formats_of(suffix)[0] == name:
        assert open_manifest([str(path)]).sources[0].format == name
    else:
        with pytest.raises(UsageError, match=f"use manifest_format {name}, or lines"):
            open_manifest([str(path)])


def test_the_settings_say_what_the_table_says():
    assert all(f".{suffix}" in SETTINGS["prompts"].help for suffix in SUFFIXES)
    assert SETTINGS["manifest_format"].allowed.split(", ") == list(CHOICES)
    hints = [FORMATS[name].hint for name in CHOICES if name != "auto"]
    assert all(hint in SETTINGS["manifest_format"].help for hint in hints)
    assert suffix_like(b"\x00\xff anything else\r?") == "txt"
