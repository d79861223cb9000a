"""The original command's YAML configs: the facts about a model, compared with its checkpoint.

A config can name classes (`target:`). Their last word is compared with the few known classes; nothing is imported or
called by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentmill.engine import ModelDescription, OriginalModelSpec
from latentmill.jobs.errors import UsageError
from latentmill.jobs.txt2img.config_keys import DDCONFIG, FIRST, MODEL, SECTIONS, TEXT, UNET

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_KNOWN_TARGETS = {
    "model": ("LatentDiffusion",),
    "model.params.unet_config": ("UNetModel",),
    # Not VQModel, which decodes without its codebook: no latent diffusion model can be trained on it.
    FIRST: ("AutoencoderKL", "VQModelInterface"),
    TEXT: ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder"),
}
_NAMED: dict[str, tuple[Any, ...]] = {
    "parameterization": tuple(_PREDICTIONS),
    "use_ema": (True, False),
    "beta_schedule": ("linear", "cosine", "sqrt_linear", "sqrt"),
}
_SHIPPED = "configs/"


def find_config(name: str) -> Path:
    """The file of that name, else the one that ships with the package. Raises UsageError for neither."""
    path = Path(name)
    if path.is_file():
        return path
    if name.startswith(_SHIPPED):
        shipped = Path(__file__).parents[2] / name
        if shipped.is_file():
            return shipped
    raise UsageError(
        f"--config {name} does not exist; give a YAML file, or {_SHIPPED}stable-diffusion/v1-inference.yaml"
    )


@dataclass(frozen=True)
class CompVisConfig:
    """A config's mappings and numbers, by dotted paths such as `model.params.channels`."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> CompVisConfig:
        """Read a YAML file. Raises UsageError if it is not one, or names a class that is not known."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date that is none
            reason = " ".join(str(error).split())
            raise UsageError(f"--config {path} cannot be read as YAML: {reason}") from None
        config = cls(path, content if isinstance(content, dict) else {})
        if not isinstance(config.get(UNET), dict):
            raise UsageError(f"--config {path} has no {UNET}; it is no config of a model")
        config._refuse_unknown_targets()
        config._refuse_what_is_not_built()
        return config

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self.content
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def model_spec(self, checkpoint: str) -> OriginalModelSpec:
        """The checkpoint, with the facts that only the config gives. What it leaves out has the original's default."""
        told: dict[str, Any] = {
            name: self._number(name, whole=name == "timesteps")
            for name in ("scale_factor", "timesteps", "linear_start", "linear_end", "cosine_s")
            if self._has(name)
        }
        told |= {name: self._one_of(name, known) for name, known in _NAMED.items() if self._has(name)}
        return OriginalModelSpec(
            model=checkpoint,
            prediction_type=_PREDICTIONS[told.pop("parameterization", "eps")],
            tokenizer=self._tokenizer(),
            timestep_spacing="original",
            **told,
        )

    def check(self, model: ModelDescription) -> None:
        """Raise UsageError for the first fact in which config and checkpoint differ."""
        for path, expected, default in self._facts(model):
            said = self.get(path, default)
            if said is not None and not _same(said, expected):
                left_out = "" if self.get(path) is not None else " (the original's default, as it has no such line)"
                raise UsageError(
                    f"--config {self.path} says {path}: {said!r}{left_out}, but {model.path} has {expected!r}: they "
                    "are not of one model; give the config that belongs to the checkpoint"
                )

    def _has(self, name: str) -> bool:
        return name in self.get(MODEL)

    def _number(self, name: str, *, whole: bool) -> float:
        value = self.get(f"{MODEL}.{name}")
        try:
            # PyYAML reads numbers such as 1e-4 as text.
            number = float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"--config {self.path} has {MODEL}.{name}: {value!r}; it must be {kind}")
        return int(number) if whole else number

    def _one_of(self, name: str, known: tuple[Any, ...]) -> Any:
        value = self.get(f"{MODEL}.{name}")
        if not any(value is entry or (isinstance(value, str) and value == entry) for entry in known):
            choices = ", ".join(str(entry).lower() if isinstance(entry, bool) else entry for entry in known)
            raise UsageError(f"--config {self.path}: {MODEL}.{name} is {value!r}; it must be {choices}")
        return value

    def _tokenizer(self) -> str | None:
        """Our own key, or what the original's CLIP embedder takes; OpenCLIP's `version` means its weights."""
        is_clip = _class_of(self.get(f"{TEXT}.target", "")) == "FrozenCLIPEmbedder"
        name = self.get(f"{TEXT}.params.tokenizer") or (self.get(f"{TEXT}.params.version") if is_clip else None)
        return None if name is None else str(name)

    def _refuse_unknown_targets(self) -> None:
        for path, known in _KNOWN_TARGETS.items():
            part, target = self.get(path), self.get(f"{path}.target")
            if part is not None and not isinstance(part, dict):
                raise UsageError(f"--config {self.path} has {path}: {part!r}; it must be a mapping with target, params")
            if target is not None and _class_of(target) not in known:
                raise UsageError(f"--config {self.path} has {path}.target: {target!r}; known are {', '.join(known)}")

    def _refuse_what_is_not_built(self) -> None:
        """A key that is silently ignored could change the picture: each is in a section, or refused by name."""
        for section in SECTIONS:
            content = self.get(section.path, {})
            if not isinstance(content, dict):
                raise UsageError(f"--config {self.path} has {section.path}: {content!r}; it must be a mapping")
            for key, value in content.items():
                where = f"--config {self.path} has {section.path}.{key}"
                if key in section.only:
                    allowed = section.only[key]
                    if value is not None and not any(value == entry for entry in allowed):
                        built = " or ".join(map(repr, allowed)) or "none"
                        raise UsageError(f"{where}: {value!r}, which this version does not draw with; built is {built}")
                elif not section.open and key not in section.read | section.inert:
                    raise UsageError(f"{where}, which is no key of the original's that is known here; leave it out")

    def _facts(self, model: ModelDescription) -> Iterator[tuple[str, Any, Any]]:
        """What is compared: the path, what the checkpoint has there in the config's terms, the original's default."""
        blueprint = model.layout.blueprint
        unet, vae = blueprint.unet, blueprint.vae
        yield f"{MODEL}.channels", vae.denoiser_channels, None
        yield f"{UNET}.in_channels", unet.in_channels, None
        yield f"{UNET}.out_channels", unet.out_channels, None
        yield f"{UNET}.model_channels", unet.channels[0], None
        yield f"{UNET}.channel_mult", _multiples(unet.channels), [1, 2, 4, 8]
        yield f"{UNET}.num_res_blocks", unet.layers_per_block, None
        yield (
            f"{UNET}.attention_resolutions",
            {2**level for level, attends in enumerate(unet.cross_attention) if attends},
            None,
        )
        # Heads of a given width overrule their number.
        if self.get(f"{UNET}.num_head_channels", -1) != -1:
            widths = sorted({width // heads for width, heads in zip(unet.channels, unet.heads, strict=True)})
            yield f"{UNET}.num_head_channels", _one_or_all(widths), None
        elif self.get(f"{UNET}.num_heads", -1) != -1:
            yield f"{UNET}.num_heads", _one_or_all(sorted(set(unet.heads))), None
        attending = [*unet.cross_attention[:-1], True]
        depths = {depth for depth, attends in zip(unet.transformer_layers, attending, strict=True) if attends}
        yield f"{UNET}.transformer_depth", _one_or_all(sorted(depths)), 1
        yield f"{UNET}.context_dim", unet.context_dim, None
        yield f"{UNET}.use_linear_in_transformer", unet.linear_projection, False
        yield f"{FIRST}.params.embed_dim", vae.denoiser_channels, None
        yield f"{FIRST}.params.n_embed", vae.codebook_size, None
        yield f"{DDCONFIG}.z_channels", vae.latent_channels, None
        yield f"{DDCONFIG}.ch", vae.channels[0], None
        yield f"{DDCONFIG}.ch_mult", _multiples(vae.channels), [1, 2, 4, 8]
        yield f"{DDCONFIG}.num_res_blocks", vae.layers_per_block, None
        yield from self._attention_of_the_autoencoder(vae.attention)
        yield from self._class_fact(FIRST, "AutoencoderKL" if vae.codebook_size is None else "VQModelInterface")
        yield from self._text_facts(model)

    def _attention_of_the_autoencoder(self, attention: tuple[bool, ...]) -> Iterator[tuple[str, Any, Any]]:
        path, resolution = f"{DDCONFIG}.attn_resolutions", self.get(f"{DDCONFIG}.resolution")
        if isinstance(resolution, int) and isinstance(self.get(path), list):
            sides = [resolution // 2**level for level in range(len(attention))]
            # A side that no level has is without effect.
            idle = {side for side in self.get(path) if side not in sides}
            yield path, idle | {side for side, attends in zip(sides, attention, strict=True) if attends}, None

    def _class_fact(self, path: str, name: str) -> Iterator[tuple[str, Any, Any]]:
        if _class_of(self.get(f"{path}.target", name)) != name:
            yield f"{path}.target", name, None

    def _text_facts(self, model: ModelDescription) -> Iterator[tuple[str, Any, Any]]:
        name, facts = model.layout.blueprint.encoders[0].original_facts()
        yield from self._class_fact(TEXT, name)
        for parameter, value, default in facts:
            yield f"{TEXT}.params.{parameter}", value, default


def _multiples(widths: tuple[int, ...]) -> list[float]:
    return [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths]


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(values) == 1 else values


def _class_of(target: object) -> str:
    return str(target).rpartition(".")[2]


def _same(said: Any, expected: Any) -> bool:
    if isinstance(expected, set):
        return isinstance(said, list) and set(map(str, said)) == set(map(str, expected))
    if isinstance(said, list) and isinstance(expected, list):
        return len(said) == len(expected) and all(map(_same, said, expected))
    if isinstance(expected, int | float) and not isinstance(said, list | dict):
        try:
            # PyYAML reads numbers such as 1e-4 as text.
            return math.isclose(float(said), expected)
        except (TypeError, ValueError):
            return False
    return bool(said == expected)
