"""A folder for the Hugging Face hub: Parquet files with pictures, a dataset card, and Croissant metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable

from latentmill.jobs.exports.card import dataset_card
from latentmill.jobs.exports.croissant import croissant
from latentmill.jobs.exports.format import File, Written
from latentmill.jobs.exports.parquet import Parquet


class HuggingFace(Parquet):
    """The same files as parquet, with what says what they are."""

    def last_files(self, written: Written) -> Iterable[File]:
        """The card and the metadata."""
        yield "README.md", dataset_card(written).encode()
        yield "croissant.json", (json.dumps(croissant(written), indent=2, ensure_ascii=False) + "\n").encode()


HF = HuggingFace()
