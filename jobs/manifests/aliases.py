"""Other programs' names of the settings, in one table: for columns of manifests and for unknown flags."""

from __future__ import annotations

import re
from collections.abc import Sequence

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FIELDS, shorten

ALIASES: dict[str, str] = {
    alias: setting
    for setting, names in {
        "prompt": "prompts text caption positive positive_prompt prompt_text",
        "negative_prompt": "neg neg_prompt negative negative_text uncond_prompt",
        "seed": "rng_seed random_seed noise_seed",
        "width": "W image_width",
        "height": "H image_height",
        "guidance_scale": "cfg cfg_scale cfgscale guidance guidance_weight scale",
        "num_inference_steps": "steps num_steps n_steps ddim_steps sampling_steps sample_steps inference_steps",
        "sampler": "scheduler sampler_name sampling_method sample_method",
        "eta": "ddim_eta",
        "image": "init_image init_img input_image",
        "strength": "denoising_strength denoise",
        "mask": "mask_image",
        "num_images": "n n_samples n_iter num_samples num_images_per_prompt images_per_prompt batch_count",
        "out": "output outdir output_dir output_folder out_dir",
        "model": "ckpt checkpoint model_id",
    }.items()
    for alias in names.split()
}
"""The name elsewhere (web UIs, diffusers, the original scripts) to the name here."""

ORDINARY_WORDS = frozenset({"images", "mark", "mass", "mode", "sample", "samples", "speed", "task", "weight"})
"""Common names of carried columns that are one edit away from a parameter."""

_SHORTEST = 4
"""Shorter names are one edit away from too many words."""


def alias_of(column: str) -> str | None:
    """The parameter that has this name here or in another program, or None."""
    for name in (column, _plain(column)):
        setting = name if name in FIELDS else ALIASES.get(name)
        if setting in FIELDS:
            return setting
    return None


def meant_by(column: str) -> str | None:
    """The parameter that a carried column's name is an alias of or one edit away from, or None."""
    if (known := alias_of(column)) is not None:
        return known
    name = _plain(column)
    if name in ORDINARY_WORDS:
        return None
    for right in (*FIELDS, *(alias for alias, setting in ALIASES.items() if setting in FIELDS)):
        long_enough = len(right) >= (_SHORTEST if right in FIELDS else _SHORTEST + 1)
        if long_enough and one_edit(name, right):
            return right if right in FIELDS else ALIASES[right]
    return None


def flag_meant_by(flag: str) -> str | None:
    """The flag that has this name in another program, both with dashes, or None."""
    name = flag.lstrip("-").replace("-", "_")
    setting = ALIASES.get(name) or ALIASES.get(name.lower())
    return None if setting in {None, "prompt"} else f"--{str(setting).replace('_', '-')}"


def read_names(columns: Sequence[str], *, accept: bool) -> list[str]:
    """The names under which a row's columns are read: unchanged, or with aliases replaced by their parameters.

    With a column `prompt`, no alias of it is replaced: a caption is then another text. Raises UsageError if two columns
    have one name.
    """
    first: dict[str, str] = {}
    for column in columns:
        known = alias_of(column) if accept and column not in FIELDS else None
        name = column if known is None or (known == "prompt" and "prompt" in columns) else known
        if name in first:
            twice = f"{shorten(column)} twice; rename one"
            two = f"{shorten(first[name])} and {shorten(column)}, which are both {name}; drop one"
            raise UsageError(f"has {twice if first[name] == column else two}")
        first[name] = column
    return list(first)


def one_edit(left: str, right: str) -> bool:
    """Whether inserting, deleting, replacing or swapping one letter makes one text the other."""
    if left == right or abs(len(left) - len(right)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    rest, other = left[start:], right[start:]
    exchanged = rest[:2] == other[:2][::-1] and rest[2:] == other[2:]
    return exchanged or rest[1:] == other[1:] or rest[1:] == other or rest == other[1:]


def _plain(column: str) -> str:
    """Lower case, with underscores between words."""
    return re.sub(r"[\s\-.]+", "_", column.strip()).lower()
