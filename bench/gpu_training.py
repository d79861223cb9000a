"""Train the embedded model further on a GPU, a piece at a time: `python -m bench.gpu_training --limit-minutes 8`.

It begins with the weights that ship, or with those of `--out` that an earlier piece left, and needs no network: the
pictures are encoded beforehand, by `python -m training --stage data` and `--stage latents` where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT
from training import diffusion, export, latents
from training.common import DEFAULT_WORK


def main(arguments: Sequence[str] | None = None) -> None:
    """Afterwards `--out` holds the model as a folder; the checkpoint in `--work` lets the next call go on."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_training", description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-day" / "embedded")
    parser.add_argument("--minutes", type=float, default=60.0, help="the whole budget, over which the rate falls")
    parser.add_argument("--limit-minutes", type=float, default=8.0, help="of this call")
    options = parser.parse_args(arguments)
    if not (options.work / latents.CHECKPOINT).is_file():
        raise SystemExit(
            f"{options.work / latents.CHECKPOINT} is not there; make it where there is a network: "
            f"make gpu-prepare, and bring that file along"
        )
    earlier = options.out if (options.out / "model_index.json").is_file() else export.EMBEDDED
    shipped = export.warm_start(options.work, earlier)
    if shipped is None:
        raise SystemExit(f"{earlier} holds no model of the shape in training/architecture.py; name another --out")
    diffusion.train(options.work, options.minutes, shipped, options.limit_minutes)
    export.export(options.work, options.out)


if __name__ == "__main__":
    main()
