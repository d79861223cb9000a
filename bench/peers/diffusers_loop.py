"""The loop that most people write: one process, one pipeline, batch after batch, each picture finished in turn."""

from __future__ import annotations

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bench.peers.common import Finisher, Generator, Options, parse


def main(options: Options) -> None:
    """The whole job."""
    rows = pq.read_table(options.manifest).to_pylist()
    generator, finisher = Generator(options), Finisher(options.out)
    made = []
    for start in range(0, len(rows), options.batch):
        batch = rows[start : start + options.batch]
        pictures = generator.generate([row["prompt"] for row in batch], [row["seed"] for row in batch])
        made += [row | finisher.finish(row["id"], pixels) for row, pixels in zip(batch, pictures, strict=True)]
    files, folder = fsspec.core.url_to_fs(f"{options.out}/dataset")
    files.makedirs(folder, exist_ok=True)
    with files.open(f"{folder}/part-00000.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(made), file)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
