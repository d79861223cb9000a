"""PNG pictures that hold their own parameters, as those of latentmill and web UIs do."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from latentmill.jobs.manifests import parameters
from latentmill.jobs.manifests.parameters_reader import LAYOUT
from latentmill.jobs.manifests.readers import Layout, ManifestFile, ParsedRow, Reader, RowBatch, parsed_batch


class PngReader(Reader):
    """A picture is one row, whose id is the file's name."""

    def scan(self, file: ManifestFile) -> Layout:  # noqa: ARG002 - the columns are always the same
        """The columns that a picture's text can give, and the id."""
        return Layout(own=(*LAYOUT.own, "id"), carried=LAYOUT.carried)

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """The one row."""
        with file.open() as stream:
            try:
                with Image.open(stream, formats=["PNG"]) as image:
                    text = getattr(image, "text", {}).get("parameters")
                fault = (
                    "the picture holds no parameters text: neither latentmill nor a web UI made it, or it was edited"
                )
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                text, fault = None, f"cannot be read as a PNG file ({' '.join(str(error).split())})"
        parsed: ParsedRow = ({}, fault) if text is None else parameters.read_parameters(text.split("\n"))
        parsed[0]["id"] = file.name
        yield parsed_batch([(1, parsed)], layout)

    def looks_like(self, start: bytes) -> bool:
        """The signature of PNG."""
        return start.startswith(b"\x89PNG")


PNG = PngReader()
