"""The model card of the embedded model, written from the figures of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import icons, pairs, scenes

CLAIM_FROM = 1.0  # share of its styles in which a name must come out for the card to claim it
RELIABLE_FROM = 0.9  # share of the prompts from which on a position is claimed
PAIRS_FROM = 0.85  # share of the prompts in which the relation must come out for pairs to be claimed
TRAINING = "training.json"
TRAINING_NOTE = Path(__file__).with_name("TRAINED.md")

_CARD = """# latentmill-embedded

A small text-to-image latent diffusion model, trained by `python -m training` (see `training/`). It is shipped so that
the whole pipeline can be run and tested with real weights and no download. It draws what is below, at 256 x 256 pixels,
and knows nothing else.

**Scenes.** One object on a plain background: `a large red circle in the center on a white background`.
Shapes: {shapes}. Colours: {colours}. Backgrounds: {backgrounds}. Positions: {positions}. Sizes: {sizes}.

{pairs}**Icons.** `a flat icon of a red apple`, optionally `... on a light blue background`. Styles: {styles}. Names
that come out in each of them: {claimed}.{others}

It cannot draw people, photographs, text{not_drawn}, or any word that is not above; such prompts give arbitrary
pictures. It has no notion of what is unsafe, and little to be unsafe with.

## Parts

Folder layout of diffusers' `StableDiffusionPipeline`, fp16 safetensors. KL autoencoder, 16 pixels per latent cell,
8 channels, scaling factor 1 (mean and deviation of the latents are folded into its 1x1 convolutions); U-Net with
cross-attention, velocity prediction, linear betas 1e-4 to 0.02, trailing timesteps; CLIP text encoder of width 128
with 3 layers and its own vocabulary. 20 DDIM steps and a guidance scale of 2 to 4 suit it.

## Figures

`python -m training.evaluate --model engine/embedded --card` ({steps} DDIM steps, guidance {guidance}, {device}:
{seconds} s per image, {processor} s of processor time).

| {prompts} held-out scene prompts | right |
|---|---|
{scene_rows}

| edges of these scenes, against the rendered truth | |
|---|---|
{edge_rows}

| first stage: held-out pictures encoded and decoded | |
|---|---|
{first_stage_rows}

| {pair_prompts} held-out prompts with two objects | right |
|---|---|
{pair_rows}

| guidance and negative prompts | |
|---|---|
{steering_rows}

| icons: {icon_count} pictures, nearest true icon among all {name_count} names | right |
|---|---|
| all names | {icon_share} |
| the {claimed_count} names claimed above (chosen by this very evaluation) | {claimed_share} |

The judge (`training/judge.py`, `training/edges.py`) uses no learned part. It is right about true renders in at least
99.5 % of the cases and at chance about wrong labels (`tests/training`). Held-out means: the combination of words never
occurred in training, in whichever order two objects are named. A position is claimed from {reliable}, two objects from
{pairs_from} of the relations.

{history}{trained}
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rows(figures: Mapping[str, float], form: str = "") -> str:
    return "\n".join(
        f"| {word} | {format(value, form) if form else _percent(value)} |" for word, value in figures.items()
    )


def _history(model: Path) -> str:
    """The table of the stages, if the export left one."""
    path = model / TRAINING
    if not path.is_file():
        return ""
    stages = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        f"| {name} | {stage['began_with']} | {stage['steps']:,} | {stage['processes']} | "
        f"{stage['minutes_of_each_core']:.0f} | {stage['minutes_by_the_clock']:.0f} |"
        for name, stage in stages.items()
    ]
    head = "| stage | began with | steps | processes | minutes of processor time each | minutes by the clock |"
    return "## The last training\n\n" + "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n\n"


def write_card(model: Path, figures: Mapping[str, Any]) -> None:
    """Write `model`/README.md; the story of the training comes from `training/TRAINED.md`."""
    names: Mapping[str, Mapping[str, bool]] = figures["icons"]
    shares = {name: sum(styles.values()) / len(styles) for name, styles in names.items()}
    claimed = [name for name, share in shares.items() if share >= CLAIM_FROM]
    others = [name for name in names if name not in claimed]
    unclaimed = f" Learned, but not reliable: {', '.join(others)}." if others else ""
    words: Mapping[str, float] = figures["scenes"]
    positions = [place for place in scenes.POSITIONS if words[f"position {place}"] >= RELIABLE_FROM]
    two = figures["pairs"]["relation"] >= PAIRS_FROM
    relations = ", ".join(pairs.RELATIONS)
    example = "`a red circle left of a blue square on a white background`"
    reliability = f"Both have the right shape in {_percent(figures['pairs']['shapes'])} of the pictures."
    card = _CARD.format(
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
        positions=", ".join(positions) or "none that is reliable",
        sizes=", ".join(scenes.SIZES),
        pairs=f"**Two objects.** {example}. Relations: {relations}. {reliability}\n\n" if two else "",
        not_drawn=("" if two else ", two objects") + ("" if len(positions) == 5 else ", objects elsewhere"),
        styles=", ".join(icons.STYLES),
        claimed=", ".join(claimed) or "none",
        others=unclaimed,
        steps=figures["steps"],
        guidance=figures["guidance_scale"],
        device=figures["device"],
        seconds=figures["seconds_per_image"],
        processor=figures["processor_seconds_per_image"],
        prompts=figures["scene_prompts"],
        scene_rows=_rows(words),
        edge_rows=_rows(figures["edges"], ".3f"),
        first_stage_rows=_rows(figures["first_stage"], ".2f"),
        pair_prompts=figures["pair_prompts"],
        pair_rows=_rows(figures["pairs"]),
        steering_rows=_rows(figures["steering"]),
        icon_count=sum(len(styles) for styles in names.values()),
        name_count=len(names),
        icon_share=_percent(figures["icon_share"]),
        claimed_count=len(claimed),
        claimed_share=_percent(sum(shares[name] for name in claimed) / max(len(claimed), 1)),
        reliable=_percent(RELIABLE_FROM),
        pairs_from=_percent(PAIRS_FROM),
        history=_history(model),
        trained=TRAINING_NOTE.read_text(encoding="utf-8").strip(),
    )
    (model / "README.md").write_text(card, encoding="utf-8")
