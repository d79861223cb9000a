"""Train the embedded model further on a GPU, a piece at a time: `python -m bench.gpu_training --limit-minutes 8`.

It begins with the weights that ship, or with those of `--out` that an earlier piece left, and needs no network: the
icons are fetched and rendered beforehand, by `make gpu-prepare` where there is one. The first piece encodes pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT
from training import diffusion, export, icons, latents
from training.common import DEFAULT_WORK


def main(arguments: Sequence[str] | None = None) -> None:
    """Afterwards `--out` holds the model as a folder; the checkpoint in `--work` lets the next call go on."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_training", description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-day" / "embedded")
    parser.add_argument("--minutes", type=float, default=60.0, help="the whole budget, over which the rate falls")
    parser.add_argument("--limit-minutes", type=float, default=8.0, help="of this call")
    options = parser.parse_args(arguments)
    sprites = options.work / "npm" / icons.SPRITES
    if not (sprites.is_file() or (options.work / latents.CHECKPOINT).is_file()):
        raise SystemExit(
            f"{sprites} is not there; make it where there is a network: make gpu-prepare, and bring that file along"
        )
    earlier = options.out if (options.out / "model_index.json").is_file() else export.EMBEDDED
    shipped = export.warm_start(options.work, earlier)
    if shipped is None:
        raise SystemExit(f"{earlier} holds no model of the shape in training/architecture.py; name another --out")
    latents.encode(options.work, latents.COUNTS)
    diffusion.train(options.work, options.minutes, shipped, options.limit_minutes)
    export.export(options.work, options.out)


if __name__ == "__main__":
    main()
