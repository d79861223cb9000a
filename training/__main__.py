"""The recipe: `python -m training [--stage all|data|tokenizer|autoencoder|latents|diffusion|export]`.

Every stage goes on where it was stopped; what is finished is not done again. In a fresh work folder the recipe starts
from the weights that ship with the project: their tokenizer and first stage are kept, the second stage goes on
learning. `--from-scratch` begins with nothing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from training import autoencoder, diffusion, export, icons, latents, tokenizer
from training.evaluate import DEFAULT_WORK

STAGES = ("data", "tokenizer", "autoencoder", "latents", "diffusion", "export")


def run(stage: str, arguments: argparse.Namespace) -> None:
    """One stage, on the files that the earlier ones left in the work folder."""
    work: Path = arguments.work
    scratch = arguments.from_scratch or (work / autoencoder.CHECKPOINT).is_file()
    shipped = None if scratch else export.warm_start(work)
    if stage == "data":
        icons.load_sprites(work / "npm")
    elif stage == "tokenizer":
        if not (work / "tokenizer").is_dir():
            tokenizer.build(work / "tokenizer")
    elif stage == "autoencoder":
        if shipped is None:
            autoencoder.train(work, arguments.autoencoder_minutes)
    elif stage == "latents":
        latents.encode(work, arguments.scenes, arguments.icons)
    elif stage == "diffusion":
        diffusion.train(work, arguments.minutes, shipped, arguments.limit_minutes)
    else:
        export.export(work)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train the embedded model.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--minutes", type=float, default=75.0, help="time budget of the second stage")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="of this call's share of that budget")
    parser.add_argument("--autoencoder-minutes", type=float, default=15.0, help="time budget of the first stage")
    parser.add_argument("--scenes", type=int, default=4_000, help="scene pictures to encode")
    parser.add_argument("--icons", type=int, default=2_500, help="icon pictures to encode")
    parser.add_argument("--from-scratch", action="store_true", help="leave the shipped weights alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        run(stage, arguments)


if __name__ == "__main__":
    main()
