"""What Hugging Face's loaders look for: captions beside the pictures, and a card at the root that says where they are.

`images/00000/metadata.parquet` names the pictures of a thousand chunks with their prompts; the library `datasets` reads
a file of that name as such, and shows no picture that it does not name: not those of attempts that lost, nor contact
sheets. Both follow from the ledger alone and are published with the dataset.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.jobs.ledger.ledger import PER_FOLDER
from latentmill.jobs.ledger.records import CommitRecord

CAPTIONS_NAME = re.compile(r"images/\d{5,}/metadata\.parquet", re.ASCII)
CARD_PATH = "README.md"
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path:
    - images/*/metadata.parquet
    - images/*/*/*.png
---
Pictures made by latentmill. `dataset/*.parquet` holds a row for each sample, with all that it takes to make its picture
again; `images/*/metadata.parquet` the captions, for `datasets.load_dataset` on this folder.
"""

_COLUMNS = ("sample_id", "row_id", "prompt", "negative_prompt", "seed", "status")
Fetch = Callable[[int], CommitRecord]


def captions_path(folder: int) -> str:
    """Where the captions of that thousand of chunks lie."""
    return f"images/{folder:05d}/metadata.parquet"


def encode_captions(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """The bytes of one file of captions."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(dict(metadata) or None), buffer, compression="zstd")
    return buffer.getvalue()


class CaptionShelf:
    """Gathers captions while a ledger is read, and hands over each folder's once its last chunk has been.

    Memory holds the folders that are read in part: as many as the plan has groups, at most. Folders without a picture
    are left out. Safe to use from several threads; `on_folder` is called in one of them at a time.
    """

    def __init__(self, n_chunks: int, on_folder: Callable[[str, pa.Table], None]) -> None:
        self._n_chunks = n_chunks
        self._on_folder = on_folder
        self._open: dict[int, list[pa.Table]] = {}
        self._lock = threading.Lock()

    def watching(self, fetch: Fetch) -> Fetch:
        """The same fetch, for a reader that takes each chunk once."""

        def fetch_and_note(chunk: int) -> CommitRecord:
            record = fetch(chunk)
            self._note(chunk, record.table)
            return record

        return fetch_and_note

    def _note(self, chunk: int, rows: pa.Table) -> None:
        folder = chunk // PER_FOLDER
        size = min(PER_FOLDER, self._n_chunks - folder * PER_FOLDER)
        with self._lock:
            tables = self._open.setdefault(folder, [])
            tables.append(_captions(rows, f"images/{folder:05d}/"))
            if len(tables) < size:
                return
            table = pa.concat_tables(self._open.pop(folder)).sort_by("sample_id").combine_chunks()
            if table.num_rows:
                self._on_folder(captions_path(folder), table)


def _captions(rows: pa.Table, prefix: str) -> pa.Table:
    """The rows that have a picture, each with its place below the folder."""
    pictured = rows.filter(pc.is_valid(rows.column("image")))
    names = pc.utf8_slice_codeunits(pictured.column("image"), len(prefix))
    return pictured.select(list(_COLUMNS)).add_column(0, "file_name", names)
