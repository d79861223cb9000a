"""The table of exports: what `--to` and `--image-format` name, each with the file that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from latentmill.jobs.exports.format import Encode, ExportFormat


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


def _load(place: str) -> object:
    module, _, name = place.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), name)
