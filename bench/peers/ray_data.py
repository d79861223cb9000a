"""The plain Ray Data job, after Ray's own example of batch prediction: `python -m bench.peers.ray_data --manifest ...`.

Actors hold a diffusers pipeline and finish their pictures themselves; with `--staged`, a second stage of tasks does.
With `--checkpoint`, Ray Data skips the rows whose checkpoint it finds there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from bench.peers.common import Finisher, Generator, Options, parse


class Generate:
    """One actor."""

    def __init__(self, options: Options) -> None:
        self._generator = Generator(options)
        self._finisher = None if options.staged else Finisher(options.out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pictures = self._generator.generate([str(prompt) for prompt in batch["prompt"]], batch["seed"].tolist())
        if self._finisher is None:
            return {**batch, "pixels": pictures}
        return _finished(self._finisher, batch, pictures)


@lru_cache(maxsize=1)
def _finisher(out: str) -> Finisher:
    return Finisher(out)


def finish(batch: dict[str, Any], out: str) -> dict[str, Any]:
    """One task of the second stage; a process keeps its libraries for the next one."""
    return _finished(_finisher(out), batch, batch.pop("pixels"))


def _finished(finisher: Finisher, batch: dict[str, Any], pictures: Any) -> dict[str, Any]:
    rows = [finisher.finish(str(name), np.asarray(pixels)) for name, pixels in zip(batch["id"], pictures, strict=True)]
    return {**batch, **{key: np.array([row[key] for row in rows]) for key in rows[0]}}


def _rows(options: Options) -> Any:
    """The manifest in blocks of one batch: from memory, which starts fastest; a checkpoint needs them from a file."""
    if options.checkpoint is not None:
        return ray.data.read_parquet(options.manifest).repartition(target_num_rows_per_block=options.batch)
    table = pq.read_table(options.manifest)
    return ray.data.from_arrow([table.slice(start, options.batch) for start in range(0, len(table), options.batch)])


def main(options: Options) -> None:
    """The whole job, on a cluster of this machine."""
    from bench.peers import ray_data  # by its own name, so that workers find the functions of this file by import

    # One place more than the actors take: reading and writing are tasks of their own, and would wait for ever. What
    # filters out the rows of a checkpoint is an actor too.
    places = options.actors * options.threads + (1 if options.checkpoint is None else 2)
    ray.init(
        address="local",
        num_cpus=places,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if options.checkpoint is not None:
        from ray.data.checkpoint import CheckpointConfig

        context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=options.checkpoint, delete_checkpoint_on_success=False
        )
    made = _rows(options).map_batches(
        ray_data.Generate,
        fn_constructor_args=(options,),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=0 if options.staged else options.threads,
    )
    if options.staged:
        made = made.map_batches(
            ray_data.finish, fn_args=(options.out,), batch_size=options.batch, zero_copy_batch=True, num_cpus=1
        )
    made.write_parquet(f"{options.out}/dataset")


if __name__ == "__main__":
    main(parse(__doc__ or ""))
