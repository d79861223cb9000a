"""The recipe: `python -m training [--stage all|data|tokenizer|autoencoder|latents|diffusion|export|evaluate]`.

Every stage goes on where it was stopped; what is finished is not done again. In a fresh work folder the recipe starts
from the weights that ship with the project: the first stage's decoder and the second stage go on learning, the
encoder and with it all latents stay. `--from-scratch` begins with nothing.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from torch import Tensor

from training import autoencoder, curves, diffusion, export, icons, latents, tokenizer
from training.common import DEFAULT_WORK
from training.devices import device
from training.drawing import Settings
from training.evaluate import COUNTS, evaluate

STAGES = ("data", "tokenizer", "autoencoder", "latents", "diffusion", "export", "evaluate")
SCRATCH_MARK = "from-scratch"
MINUTES = {"cpu": (40.0, 64.0), "cuda": (8.0, 8.0)}  # of the two stages; of each core, or of the GPU


def run(stage: str, options: argparse.Namespace) -> None:
    """One stage, on the files that the earlier ones left in the work folder."""
    work: Path = options.work
    if stage == "data":
        icons.load_sprites(work / "npm")
    elif stage == "tokenizer":
        if not (work / "tokenizer").is_dir():
            tokenizer.build(work / "tokenizer")
    elif stage == "autoencoder":
        begin(options)
        autoencoder.train(work, options.autoencoder_minutes, options.processes)
    elif stage == "latents":
        begin(options)
        counts = {"scenes": options.scenes, "pairs": options.pairs, "icons": options.icons}
        latents.encode(work, counts, options.processes)
    elif stage == "diffusion":
        diffusion.train(work, options.minutes, begin(options), options.limit_minutes, options.processes)
    elif stage == "export":
        export.export(work, options.out)
        curves.draw(work, options.curves)
    else:
        evaluate(Settings(), options.out, work, COUNTS, card=True)


def begin(options: argparse.Namespace) -> dict[str, Tensor] | None:
    """The second stage's weights to start from, if any; what a work folder began with is what it goes on with."""
    mark: Path = options.work / SCRATCH_MARK
    if options.from_scratch:
        if (options.work / autoencoder.START).is_file():
            raise SystemExit(f"{options.work} began with the shipped weights: name another --work, or remove it")
        mark.touch()
    return None if mark.is_file() else export.warm_start(options.work)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train the embedded model.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=export.EMBEDDED, help="where the model is written")
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_name("curves.png"), help="their picture")
    parser.add_argument("--autoencoder-minutes", type=float, help="for the first stage: 40 of each core, or 8 of a GPU")
    parser.add_argument("--minutes", type=float, help="for the second stage: 64 of each core, or 8 of a GPU")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="of this call's share of the latter")
    parser.add_argument("--processes", type=int, help="one thread each; as many as cores unless named")
    parser.add_argument("--scenes", type=int, default=latents.COUNTS["scenes"], help="one-object pictures to encode")
    parser.add_argument("--pairs", type=int, default=latents.COUNTS["pairs"], help="two-object pictures to encode")
    parser.add_argument("--icons", type=int, default=latents.COUNTS["icons"], help="icon pictures to encode")
    parser.add_argument("--from-scratch", action="store_true", help="leave the shipped weights alone")
    options = parser.parse_args()
    first, second = MINUTES[device().type]
    options.autoencoder_minutes = options.autoencoder_minutes or first
    options.minutes = options.minutes or second
    options.work.mkdir(parents=True, exist_ok=True)
    # Whoever needs the machine may stop (kill -STOP -- -PID, then -CONT) or end it; it goes on where it was.
    (options.work / "pid").write_text(f"{os.getpid()}\n")
    for stage in STAGES if options.stage == "all" else (options.stage,):
        run(stage, options)


if __name__ == "__main__":
    main()
