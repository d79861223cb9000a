"""Text manifests with one prompt per line."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from latentmill.jobs.manifests.readers import TOO_LONG, Layout, ManifestFile, Reader, RowBatch, read_lines


class LinesReader(Reader):
    """Rows are numbered by line: blank lines count, but are not rows."""

    def scan(self, file: ManifestFile) -> Layout:  # noqa: ARG002 - the columns are always the same
        """One column, the prompt."""
        return Layout(own=("prompt",), carried=())

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:  # noqa: ARG002 - one column
        """A row for each line with text."""
        start = 1
        with file.open() as stream:
            for lines in read_lines(stream):
                kept = [index for index, line in enumerate(lines) if line is None or line.strip()]
                numbers = np.array(kept, dtype=np.int64) + start
                start += len(lines)
                prompts = [line if line is None else line.removesuffix("\r") for line in map(lines.__getitem__, kept)]
                faults = {index: TOO_LONG for index, prompt in enumerate(prompts) if prompt is None}
                yield RowBatch(lines=numbers, columns={"prompt": prompts}, faults=faults)


LINES = LinesReader()
