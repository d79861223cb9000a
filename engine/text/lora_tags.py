"""LoRAs named in prompts: `<lora:name:0.8>`, as the A1111 web UI takes them. Without torch."""

from __future__ import annotations

import re

from latentmill.engine.types import LORA_SCALE_LIMIT, EngineError

_TAG = re.compile(r"<lora:([^<>]*)>")
_START = "<lora:"


def has_lora_tags(text: str) -> bool:
    """Whether a prompt names a LoRA."""
    return _START in text


def without_lora_tags(text: str) -> str:
    """The prompt as it is encoded: its tags are no words."""
    return _TAG.sub("", text) if has_lora_tags(text) else text


def lora_tags(text: str) -> dict[str, float]:
    """The scale of each LoRA that a prompt names; one that is named twice has the sum, as there.

    Raises EngineError for a tag that is not a name and one number, from which the scale defaults to 1.
    """
    scales: dict[str, float] = {}
    for content in _TAG.findall(text) if has_lora_tags(text) else ():
        name, _, number = content.partition(":")
        try:
            scale = float(number) if number.strip() else 1.0
        except ValueError:
            raise EngineError(f"<lora:{content[:80]}> is not <lora:NAME:SCALE>; write one number as scale") from None
        scales[name.strip()] = scales.get(name.strip(), 0.0) + scale
    for name, scale in scales.items():
        if not -LORA_SCALE_LIMIT <= scale <= LORA_SCALE_LIMIT:
            raise EngineError(
                f"the prompt gives LoRA {name[:80]!r} the scale {scale:g}; it must be from {-LORA_SCALE_LIMIT:g} to "
                f"{LORA_SCALE_LIMIT:g}"
            )
    return scales
