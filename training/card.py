"""The model card of the embedded model, written from the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import icons, scenes

CLAIM_FROM = 1.0  # share of its styles in which a name must come out for the card to claim it
TRAINING_NOTE = Path(__file__).with_name("TRAINED.md")

_CARD = """# latentmill-embedded

A small text-to-image latent diffusion model, trained from nothing by `python -m training` (see `training/`). It is
shipped so that the whole pipeline can be run and tested with real weights and no download. It draws two things, at
256 x 256 pixels, and knows no others.

**Scenes.** One object on a plain background: `a large red circle in the center on a white background`.
Shapes: {shapes}. Colours: {colours}. Backgrounds: {backgrounds}. Positions: {positions}. Sizes: {sizes}.

**Icons.** `a flat icon of a red apple`, optionally `... on a light blue background`. Styles: {styles}. Names that
come out in every style: {claimed}.{others}

It cannot draw people, photographs, text, two objects, objects off the centre, or any word that is not above; such
prompts give arbitrary pictures. It has no notion of what is unsafe, and little to be unsafe with.

## Parts

Folder layout of diffusers' `StableDiffusionPipeline`, fp16 safetensors. KL autoencoder, 16 pixels per latent cell,
8 channels, scaling factor 1 (mean and deviation of the latents are folded into its 1x1 convolutions); U-Net with
cross-attention, velocity prediction, linear betas 1e-4 to 0.02, trailing timesteps; CLIP text encoder of width 128
with 3 layers and its own vocabulary. 20 DDIM steps and a guidance scale of 3 to 5 suit it.

## Figures

`python -m training.evaluate --model engine/embedded --card` ({steps} DDIM steps, guidance {guidance}, {device}:
{seconds} s per image).

| {prompts} held-out scene prompts | right |
|---|---|
{scene_rows}

| icons: {icon_count} pictures, nearest true icon among all {name_count} names | right |
|---|---|
| all names | {icon_share} |
| the {claimed_count} names claimed above (chosen by this very evaluation) | {claimed_share} |

The judge (`training/judge.py`) uses no learned part. It is right about true renders in at least 99.5 % of the cases and
at chance about wrong labels (`tests/training/test_judge.py`). Held-out means: the combination of shape, colour,
background, position and size never occurred in training. There are {held_out} of them, drawn in turn with new seeds.

{trained}
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write_card(model: Path, figures: Mapping[str, Any]) -> None:
    """Write `model`/README.md; the story of the training comes from `training/TRAINED.md`."""
    names: Mapping[str, float] = figures["icons"]
    claimed = [name for name, share in names.items() if share >= CLAIM_FROM]
    others = [name for name in names if name not in claimed]
    unclaimed = f" Learned, but not reliable: {', '.join(others)}." if others else ""
    card = _CARD.format(
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
        positions=", ".join(scenes.TRAINED_POSITIONS),
        sizes=", ".join(scenes.SIZES),
        styles=", ".join(icons.STYLES),
        claimed=", ".join(claimed),
        others=unclaimed,
        steps=figures["steps"],
        guidance=figures["guidance_scale"],
        device=figures["device"],
        seconds=figures["seconds_per_image"],
        prompts=figures["scene_prompts"],
        held_out=len(scenes.split(held_out=True)),
        scene_rows="\n".join(f"| {word} | {_percent(share)} |" for word, share in figures["scenes"].items()),
        icon_count=len(names) * len(icons.STYLES),
        name_count=len(names),
        icon_share=_percent(figures["icon_share"]),
        claimed_count=len(claimed),
        claimed_share=_percent(sum(names[name] for name in claimed) / max(len(claimed), 1)),
        trained=TRAINING_NOTE.read_text(encoding="utf-8").strip(),
    )
    (model / "README.md").write_text(card, encoding="utf-8")
