"""The table of exports: what `--to` and `--image-format` name, each with the file that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from latentmill.jobs.exports.format import Encode, ExportFormat, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportEntry:
    """One format. `place` names a module of this folder and the `ExportFormat` in it.

    `what` says what the files are, and `loader` is one line that opens them, for the documentation.
    """

    place: str
    what: str
    loader: str

    @property
    def format(self) -> ExportFormat:
        """Loaded when it is used: `--help` must not wait for pyarrow."""
        return cast("ExportFormat", _load(self.place))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEntry:
    """One form of pictures. `place` names a module of this folder and the function in it that encodes them.

    `quality` says what `--image-quality` means for it; empty if it has none.
    """

    suffix: str
    place: str
    what: str
    quality: str = ""

    @property
    def encode(self) -> Encode:
        """Loaded when it is used."""
        return cast("Encode", _load(self.place))


EXPORTS: Mapping[str, ExportEntry] = {
    "webdataset": ExportEntry(
        place="webdataset.WEBDATASET",
        what="tar files `000000.tar`, ...; of each sample `KEY.png`, `KEY.json` (the row) and `KEY.txt` (the prompt)",
        loader='webdataset.WebDataset("DEST/{000000..000012}.tar", shardshuffle=False).decode("pil")',
    ),
    "hf": ExportEntry(
        place="hf.HF",
        what="a folder for the Hugging Face hub: parquet as below, a dataset card, Croissant metadata",
        loader='datasets.load_dataset("DEST")',
    ),
    "parquet": ExportEntry(
        place="parquet.PARQUET",
        what="`data/train-00000-of-00012.parquet`: rows with their pictures as `struct<bytes, path>`",
        loader='polars.read_parquet("DEST/data/*.parquet")',
    ),
    "coco-captions": ExportEntry(
        place="coco.COCO_CAPTIONS",
        what="`images/`, and `annotations/captions_train.json`, whose `file_name` is relative to `images/`",
        loader='torchvision.datasets.CocoCaptions("DEST/images", "DEST/annotations/captions_train.json")',
    ),
    "csv": ExportEntry(
        place="tables.CSV",
        what="`train-00000-of-00012.csv`, whose `file_name` is relative to DEST, and `images/`",
        loader='pandas.read_csv("DEST/train-00000-of-00001.csv")',
    ),
    "jsonl": ExportEntry(
        place="tables.JSONL",
        what="`train-00000-of-00012.jsonl`, with the same names, and `images/`",
        loader="duckdb.sql(\"from read_json('DEST/*.jsonl')\")",
    ),
}

IMAGE_FORMATS: Mapping[str, ImageEntry] = {
    "png": ImageEntry(suffix="png", place="images.png", what="the very bytes of the dataset"),
    "webp": ImageEntry(
        suffix="webp", place="images.webp", what="WebP, lossless without a quality", quality="1 to 100, lossy"
    ),
    "jpeg": ImageEntry(
        suffix="jpg", place="images.jpeg", what="JPEG, colours in full resolution", quality="1 to 100, 95 if not given"
    ),
}

RUNNERS: Mapping[str, str] = {"threads": "runners.threads", "ray": "runners.ray"}
"""Where shards are written, by the names of `--executor`: each a function of a module of this folder."""


def runner(name: str) -> Run:
    """Loaded when it is used."""
    return cast("Run", _load(RUNNERS[name]))


def _load(place: str) -> object:
    module, _, name = place.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), name)
