"""The `parameters` text of web UIs, in both directions: prompt, negative prompt, and a last line of settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from latentmill.engine import SAMPLER_LABELS, GenerationRequest
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.manifests.loras import format_scales

TEXT_LIMIT = 16_384
"""Bytes of text in one picture: Pillow writes more, but refuses to read much more back."""

_BY_NAME = {name.lower(): sampler for sampler, name in SAMPLER_LABELS.items()}
# What web UIs choose for `Automatic`; no sampler here has the exponential sigmas of DPM++ 2M SDE.
_AUTOMATIC = {"dpm++ 2m": "karras", "dpm++ 2m sde": "exponential"}
_PLAIN_SCHEDULES = {"uniform", "normal"}

_PAIR = re.compile(r'(\w[\w \-/]{0,63}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_MIN_PAIRS = 3
_SIZE = re.compile(r"(\d{1,6})\s*[xX]\s*(\d{1,6})")
PROMPT_STARTS = _POSITIVE, _NEGATIVE = "Positive prompt:", "Negative prompt:"
_NUMBERS = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Eta": "eta"}
_PROMPT_LINES = "Prompt lines"
_KNOWN = {*_NUMBERS, "Sampler", "Size"}
_SURROGATES = re.compile("[\ud800-\udfff]")

COLUMNS = (
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "guidance_scale",
    "num_inference_steps",
    "sampler",
    "eta",
)
"""The columns that a text can give. Other settings of its last line are kept as JSON in the column `parameters`."""


def parameters_text(request: GenerationRequest, *, model_name: str, model_hash: str, version: str) -> str:
    """The request as such a text; `read_parameters` reads the same request back.

    The last line holds the settings and is never cut; prompts are cut so that all stays within TEXT_LIMIT bytes.
    """
    settings = {
        "Steps": str(request.num_inference_steps),
        "Sampler": SAMPLER_LABELS[request.sampler],
        "CFG scale": _number(request.guidance_scale),
        "Seed": str(request.seed),
        "Size": f"{request.width}x{request.height}",
        "Model hash": model_hash,
        "Model": model_name,
        "Version": version,
    }
    if request.strength is not None:
        settings["Denoising strength"] = _number(request.strength)
    if request.eta:
        settings["Eta"] = _number(request.eta)
    if any(scale for _, scale in request.loras):
        settings["LoRAs"] = format_scales(dict(request.loras))
    prompt, negative = _clean(request.prompt), _clean(request.negative_prompt)
    ambiguous = any(line.startswith((_NEGATIVE, _POSITIVE)) for line in [*prompt.split("\n"), *negative.split("\n")])
    if ambiguous:  # the texts do not show where the prompt ends, so a setting does
        settings[_PROMPT_LINES] = str(prompt.count("\n") + 1)
    head = f"\n{_NEGATIVE} "
    room = TEXT_LIMIT - len(_settings_line(settings).encode()) - len(head) - 1
    prompt = _cut(prompt, room - min(len(negative.encode()), room // 2))
    negative = _cut(negative, room - len(prompt.encode()))
    if ambiguous:
        settings[_PROMPT_LINES] = str(prompt.count("\n") + 1)
    return f"{prompt}{head + negative if negative else ''}\n{_settings_line(settings)}"


def _settings_line(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {_quote(_clean(value))}" for key, value in settings.items())


def is_settings(line: str) -> bool:
    """Whether a line holds settings: three or more `key: value` pairs, the first of them known."""
    return len(_pairs(line)) >= _MIN_PAIRS


def read_parameters(lines: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """A text's columns, and why they cannot be used, or None. Unknown keys are kept in `parameters`."""
    settings = dict(_pairs(lines[-1]))
    if len(settings) >= _MIN_PAIRS:
        lines = lines[:-1]
    else:
        settings = {}
    prompt, negative = _prompts(lines, settings.pop(_PROMPT_LINES, None))
    row: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    row |= {column: settings.pop(key) for key, column in _NUMBERS.items() if key in settings}
    faults = []
    size = settings.pop("Size", None)
    if size is not None:
        match = _SIZE.fullmatch(size)
        if match is None:
            faults.append(f"Size {shorten(size)} is not WIDTHxHEIGHT; write for example 512x512")
        else:
            row |= {"width": int(match[1]), "height": int(match[2])}
    if "Sampler" in settings:
        name, schedule = settings.pop("Sampler"), settings.pop("Schedule type", "")
        row["sampler"] = find_sampler(name, schedule)
        if row["sampler"] is None:
            faults.append(unknown_sampler(name, schedule))
    row["parameters"] = json.dumps(settings, ensure_ascii=False) if settings else None
    return row, "; ".join(faults) or None


def find_sampler(name: str, schedule: str = "") -> str | None:
    """The sampler with this name here or in a web UI; None if it is unknown."""
    base, kind = name.strip().lower(), schedule.strip().lower()
    if kind == "automatic":
        kind = _AUTOMATIC.get(base, "")
    if kind and kind not in _PLAIN_SCHEDULES and not base.endswith(kind):
        base = f"{base} {kind}"
    return _BY_NAME.get(base, base if base in SAMPLER_LABELS else None)


def unknown_sampler(name: str, schedule: str = "") -> str:
    """The reason for refusing a sampler."""
    kind = f" with schedule type {shorten(schedule)}" if schedule else ""
    return f"sampler {shorten(name)}{kind} is unknown; known: {', '.join(SAMPLER_LABELS.values())}"


def _pairs(line: str) -> list[tuple[str, str]]:
    """The `key: value` pairs of a line that starts with a known key; values in quotes are JSON."""
    line = line.strip()
    first = _PAIR.match(line)
    if first is None or first[1] not in _KNOWN:
        return []
    return [(match[1], _unquote(match[2].strip())) for match in _PAIR.finditer(line)]


def _unquote(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        try:
            decoded = json.loads(value, strict=False)
        except ValueError:
            return value
        return decoded if isinstance(decoded, str) else value
    return value


def _prompts(lines: Sequence[str], prompt_lines: str | None) -> tuple[str, str | None]:
    """Prompt and negative prompt, which begins at the first line that says so, or after `prompt_lines` lines."""
    if prompt_lines is not None and prompt_lines.isdecimal():
        start = min(int(prompt_lines), len(lines))
    else:
        found = (number for number, line in enumerate(lines) if line.startswith(_NEGATIVE))
        start = next(found, len(lines))
        if lines and lines[0].startswith(_POSITIVE):
            lines = [lines[0].removeprefix(_POSITIVE).removeprefix(" "), *lines[1:]]
    prompt, rest = "\n".join(lines[:start]), "\n".join(lines[start:])
    return prompt, rest.removeprefix(_NEGATIVE).removeprefix(" ") if rest else None


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _clean(text: str) -> str:
    """PNG text can hold neither NUL nor lone surrogates."""
    return _SURROGATES.sub("\ufffd", text.replace("\0", "\ufffd"))


def _cut(text: str, limit: int) -> str:
    data = text.encode()
    return text if len(data) <= limit else data[: max(0, limit - 3)].decode(errors="ignore") + "…"
