"""Which words stand in a picture, and how much of it they cover, as the library rapidocr reads them.

The optional extra `latentmill[text]`. Its models (PP-OCRv6 for onnxruntime, Apache-2.0) are in its wheel; nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.scores.scorer import Value
from latentmill.jobs.scores.spec import ScoreSpec

_FINDS, _READS = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"


class WrittenText:
    """`text` is null where there is none; `text_share` is the share of the picture that lines of text cover."""

    name = "text"
    columns = {"text": "string", "text_share": "float32"}  # noqa: RUF012 - a constant of the class

    def __init__(self, folder: Path) -> None:
        from rapidocr import RapidOCR

        self.version = f"1, rapidocr {version('rapidocr')}"
        self._read = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # pictures of models stand upright
                "Det.model_path": str(folder / _FINDS),  # named, so that none is ever downloaded in its place
                "Rec.model_path": str(folder / _READS),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    @classmethod
    def load(cls, spec: ScoreSpec) -> WrittenText:  # noqa: ARG003 - as all are called; it runs on the CPU
        """With the models of the package. Raises UsageError if it is not installed, or has others."""
        try:
            import rapidocr
        except ImportError as error:
            raise UsageError(
                "the scorer text needs a library that is not here; pip install 'latentmill[text]'"
            ) from error
        folder = Path(str(rapidocr.__file__)).parent / "models"
        missing = next((name for name in (_FINDS, _READS) if not (folder / name).is_file()), None)
        if missing is not None:
            raise UsageError(
                f"rapidocr {version('rapidocr')} has no model {missing} in its wheel; install the version of "
                f"constraints.txt"
            )
        return cls(folder)

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[Value]]:  # noqa: ARG002 - as all are called
        """The lines of each picture from top to bottom, and their share of it."""
        found = [self._of(picture) for picture in pictures]
        return {"text": [words for words, _ in found], "text_share": [share for _, share in found]}

    def _of(self, picture: Pixels) -> tuple[str | None, float]:
        read: Any = self._read(np.ascontiguousarray(picture[:, :, ::-1]))
        if read.boxes is None or not read.txts:
            return None, 0.0
        covered = sum(_area(box) for box in read.boxes) / (picture.shape[0] * picture.shape[1])
        printable = (letter if letter.isprintable() else " " for letter in " ".join(read.txts))
        return " ".join("".join(printable).split()) or None, min(1.0, covered)


def _area(box: Any) -> float:
    """Of a polygon (n, 2), by the shoelace formula."""
    x, y = np.asarray(box, dtype=np.float64).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
