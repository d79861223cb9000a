"""How good the embedded model is, by a program: `python -m training.evaluate --model engine/embedded`.

Scenes: held-out prompts, each picture described by `training.judge` and compared word by word. Icons: each claimed
name in each style, the picture's nearest neighbour among the true icons of all claimed names. The figures go to
standard output and, with `--card`, into the model card.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentmill.engine import Engine, GenerationRequest, ModelSpec
from training import icons, judge, scenes
from training.card import write_card
from training.common import contact_sheet
from training.export import EMBEDDED
from training.scenes import Pixels

STEPS, GUIDANCE, BATCH = 20, 4.0, 8
WORDS = ("background", "colour", "shape", "position", "size")
DEFAULT_WORK = Path(__file__).resolve().parent / ".cache"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the pictures are made."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    device: str = "cpu"

    def draw(self, engine: Engine, prompts: Sequence[str], first_seed: int) -> list[Pixels]:
        """One picture per prompt, seeds counting up from `first_seed`; a failed one raises."""
        requests = [
            GenerationRequest(
                prompt=prompt,
                seed=first_seed + index,
                width=scenes.IMAGE_SIZE,
                height=scenes.IMAGE_SIZE,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
            )
            for index, prompt in enumerate(prompts)
        ]
        pictures = []
        for request, result in zip(requests, engine.generate(requests), strict=True):
            if result.pixels is None:
                raise RuntimeError(f"{request.prompt!r} with seed {request.seed} failed: {result.error}")
            pictures.append(result.pixels)
        return pictures


def load(model: Path, device: str) -> Engine:
    """The model without its safety checker: here the pictures are judged, not published."""
    dtype = "float32" if device == "cpu" else "float16"
    return Engine.load(ModelSpec(model=str(model), safety="none"), device=device, dtype=dtype, batch_size=BATCH)


def evaluate_scenes(engine: Engine, settings: Settings, count: int) -> tuple[dict[str, float], list[Pixels], list[str]]:
    """(share of `count` held-out prompts with each word right, pictures, what went wrong where)."""
    drawn = scenes.draw_scenes(scenes.split(held_out=True), count, np.random.default_rng(0))
    pictures = settings.draw(engine, [scenes.caption(scene) for scene in drawn], first_seed=1000)
    marks, wrong = [], []
    for scene, picture in zip(drawn, pictures, strict=True):
        seen = judge.look(picture)
        marks.append(seen.agrees(scene))
        missed = [f"{word}: {getattr(seen, word)}" for word in WORDS if not marks[-1][word]]
        if missed:
            wrong.append(f"{scenes.caption(scene)} -> {', '.join(missed)}")
    shares = {word: float(np.mean([mark[word] for mark in marks])) for word in WORDS}
    shares["all five"] = float(np.mean([all(mark.values()) for mark in marks]))
    for shape in scenes.SHAPES:
        own = [mark["shape"] for scene, mark in zip(drawn, marks, strict=True) if scene.shape == shape]
        shares[f"shape of a {shape}"] = float(np.mean(own)) if own else float("nan")
    return shares, pictures, wrong


def evaluate_icons(
    engine: Engine, settings: Settings, names: Sequence[str], work: Path
) -> tuple[dict[str, float], list[Pixels]]:
    """(per name: share of the styles whose picture is nearest to a true one of that name, pictures)."""
    sprites = icons.load_sprites(work / "npm")
    wanted = [icons.Icon(name=name, style=style, background="white") for name in names for style in icons.STYLES]
    gallery = [(icon.name, judge.icon_features(icons.render(icon, sprites))) for icon in wanted]
    pictures = settings.draw(engine, [icons.caption(icon) for icon in wanted], first_seed=5000)
    right: dict[str, list[bool]] = {name: [] for name in names}
    for icon, picture in zip(wanted, pictures, strict=True):
        right[icon.name].append(judge.nearest_name(picture, gallery) == icon.name)
    return {name: float(np.mean(marks)) for name, marks in right.items()}, pictures


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, as the model card and the tests of the bars read them."""
    settings = Settings(steps=arguments.steps, guidance=arguments.guidance, device=arguments.device)
    engine = load(arguments.model, arguments.device)
    sheets = arguments.work / "sheets"
    settings.draw(engine, ["a red circle"], first_seed=0)  # the first pass sets up threads and memory
    start = time.perf_counter()
    shares, pictures, wrong = evaluate_scenes(engine, settings, arguments.scenes)
    seconds = (time.perf_counter() - start) / arguments.scenes
    contact_sheet(pictures[:64], sheets / "evaluation-scenes.png")
    names, names_pictures = evaluate_icons(engine, settings, list(icons.NAMES), arguments.work)
    contact_sheet(names_pictures, sheets / "evaluation-icons.png", columns=12, cell=128)
    for line in wrong:
        print(f"wrong: {line}")
    return {
        "scenes": shares,
        "scene_prompts": arguments.scenes,
        "icons": names,
        "icon_share": float(np.mean(list(names.values()))),
        "seconds_per_image": round(seconds, 3),
        "steps": settings.steps,
        "guidance_scale": settings.guidance,
        "device": f"{arguments.device}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", action="store_true", help="write the figures into the model's README.md")
    arguments = parser.parse_args()
    figures = measure(arguments)
    print(json.dumps(figures, indent=2))
    if arguments.card:
        write_card(arguments.model, figures)


if __name__ == "__main__":
    main()
