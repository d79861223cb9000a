"""How good the embedded model is, by a program: `python -m training.evaluate --model engine/embedded`.

Scenes and pairs: held-out prompts, each picture described by `training.judge` and compared word by word; the scenes'
edges are held against the rendered truth (`training.edges`). Icons: each name in each style, the picture's nearest
neighbour among the true icons of all names. The figures go to standard output and, with `--card`, into the model card.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentmill.engine import Engine
from training import edges, icons, judge, pairs, reconstruction, scenes
from training.card import write_card
from training.common import DEFAULT_WORK, contact_sheet
from training.drawing import GUIDANCE, STEPS, Settings
from training.export import EMBEDDED
from training.scenes import Pixels

COUNTS = {"scenes": 200, "pairs": 100}
WORDS = ("background", "colour", "shape", "position", "size")


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
    for word, values in (("shape", scenes.SHAPES), ("position", tuple(scenes.POSITIONS))):
        for value in values:
            own = [mark[word] for scene, mark in zip(drawn, marks, strict=True) if getattr(scene, word) == value]
            shares[f"{word} {value}"] = float(np.mean(own)) if own else float("nan")
    return shares, pictures, wrong


def evaluate_edges(pictures: Sequence[Pixels], shapes: Sequence[str]) -> dict[str, float]:
    """How true and how crisp the edges of one-object pictures are, each of the shape that its caption names."""
    return {
        "F-score at 2 px": float(np.mean([edges.scene_score(*pair) for pair in zip(pictures, shapes, strict=True)])),
        "width in px": float(np.nanmean([edges.width(picture) for picture in pictures])),
    }


def evaluate_pairs(engine: Engine, settings: Settings, count: int) -> tuple[dict[str, float], list[Pixels]]:
    """(share of `count` held-out prompts with each word right, pictures)."""
    drawn = pairs.draw_pairs(count, np.random.default_rng(0), held_out=True)
    pictures = settings.draw(engine, [pairs.caption(pair) for pair in drawn], first_seed=3000)
    marks = [judge.look_at_pair(picture, pair) for picture, pair in zip(pictures, drawn, strict=True)]
    return {word: float(np.mean([mark[word] for mark in marks])) for word in judge.PAIR_WORDS}, pictures


def evaluate_icons(
    engine: Engine, settings: Settings, names: Sequence[str], work: Path
) -> tuple[dict[str, dict[str, bool]], list[Pixels]]:
    """(per name and style: whether the picture is nearest to a true one of that name, pictures)."""
    sprites = icons.load_sprites(work / "npm")
    wanted = [icons.Icon(name=name, style=style, background="white") for name in names for style in icons.STYLES]
    gallery = [(icon.name, judge.icon_features(icons.render(icon, sprites))) for icon in wanted]
    pictures = settings.draw(engine, [icons.caption(icon) for icon in wanted], first_seed=5000)
    right: dict[str, dict[str, bool]] = {name: {} for name in names}
    for icon, picture in zip(wanted, pictures, strict=True):
        right[icon.name][icon.style] = judge.nearest_name(picture, gallery) == icon.name
    return right, pictures


def evaluate_steering(
    engine: Engine, settings: Settings, scene_count: int, names: Sequence[str], work: Path
) -> dict[str, float]:
    """What guidance and negative prompts change, as shares of pictures.

    Guidance: held-out scenes right in every word without it; their share with it stands among the scenes' figures.
    Negative prompts: icons whose caption leaves the style open and that come out flat, without and with a negative
    prompt that asks for flat ones.
    """
    drawn = scenes.draw_scenes(scenes.split(held_out=True), scene_count, np.random.default_rng(0))
    weak = replace(settings, guidance=1.0)
    pictures = weak.draw(engine, [scenes.caption(scene) for scene in drawn], first_seed=1000)
    marks = [judge.look(picture).agrees(scene) for picture, scene in zip(pictures, drawn, strict=True)]
    shares = {"scenes right in all words at guidance 1": float(np.mean([all(mark.values()) for mark in marks]))}
    sprites = icons.load_sprites(work / "npm")
    for title, negative in (("no", None), ("a flat", [f"a flat icon of {name}" for name in names])):
        prompts = [f"an icon of {name}" for name in names]
        flat = []
        for name, picture in zip(names, settings.draw(engine, prompts, 7000, negative), strict=True):
            own = [icons.Icon(name=name, style=style, background="white") for style in icons.STYLES]
            gallery = [(icon.style, judge.icon_features(icons.render(icon, sprites))) for icon in own]
            flat.append(judge.nearest_name(picture, gallery) == "flat")
        shares[f"icons of any style flat with {title} negative prompt"] = float(np.mean(flat))
    return shares


def measure(settings: Settings, model: Path, work: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """All figures, as the model card and the tests of the bars read them."""
    engine = settings.load(model)
    sheets = work / "sheets"
    settings.draw(engine, ["a red circle"], first_seed=0)  # the first pass sets up threads and memory
    start, processor = time.perf_counter(), time.process_time()
    shares, pictures, wrong = evaluate_scenes(engine, settings, counts["scenes"])
    seconds = (time.perf_counter() - start) / counts["scenes"]
    processor = (time.process_time() - processor) / counts["scenes"]
    contact_sheet(pictures[:64], sheets / "evaluation-scenes.png")
    drawn = scenes.draw_scenes(scenes.split(held_out=True), counts["scenes"], np.random.default_rng(0))
    two, two_pictures = evaluate_pairs(engine, settings, counts["pairs"])
    contact_sheet(two_pictures[:64], sheets / "evaluation-pairs.png")
    names, names_pictures = evaluate_icons(engine, settings, list(icons.NAMES), work)
    contact_sheet(names_pictures, sheets / "evaluation-icons.png", columns=12, cell=128)
    for line in wrong:
        print(f"wrong: {line}")
    marks = [mark for styles in names.values() for mark in styles.values()]
    return {
        "scenes": shares,
        "scene_prompts": counts["scenes"],
        "edges": evaluate_edges(pictures, [scene.shape for scene in drawn]),
        "first_stage": reconstruction.measure(reconstruction.shipped(model), work),
        "pairs": two,
        "pair_prompts": counts["pairs"],
        "steering": evaluate_steering(engine, settings, counts["scenes"] // 4, list(icons.NAMES)[::2], work),
        "icons": names,
        "icon_share": float(np.mean(marks)),
        "seconds_per_image": round(seconds, 3),
        "processor_seconds_per_image": round(processor, 3),
        "steps": settings.steps,
        "guidance_scale": settings.guidance,
        "device": f"{settings.device}, {torch.get_num_threads()} threads",
    }


def evaluate(settings: Settings, model: Path, work: Path, counts: Mapping[str, int], *, card: bool) -> None:
    """Measure `model` on `counts` of scenes and pairs and on all icons; print the figures, write the card if wanted."""
    figures = measure(settings, model, work, counts)
    print(json.dumps(figures, indent=2))
    if card:
        write_card(model, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--scenes", type=int, default=COUNTS["scenes"])
    parser.add_argument("--pairs", type=int, default=COUNTS["pairs"])
    parser.add_argument("--threads", type=int, help="of torch; all cores unless named")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sampler", default=Settings.sampler)
    parser.add_argument("--device", help="a GPU where there is one, unless named")
    parser.add_argument("--lora", type=Path, action="append", default=[], help="a file to be used at scale 1")
    parser.add_argument("--card", action="store_true", help="write the figures into the model's README.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        device=options.device or Settings().device,
        loras={path.stem: path for path in options.lora},
    )
    counts = {"scenes": options.scenes, "pairs": options.pairs}
    evaluate(settings, options.model, options.work, counts, card=options.card)


if __name__ == "__main__":
    main()
