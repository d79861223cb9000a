"""The original command's YAML configs: what they say of a model, held against what its checkpoint holds.

A config can name classes (`target:`). They are compared with the few that are known by their last word, and nothing is
ever imported or called by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentmill.engine import ModelDescription, ModelSpec
from latentmill.jobs.errors import UsageError

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_KNOWN_TARGETS = {
    "model": ("LatentDiffusion",),
    "model.params.unet_config": ("UNetModel",),
    "model.params.first_stage_config": ("AutoencoderKL", "VQModelInterface", "VQModel"),
    "model.params.cond_stage_config": ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder"),
}
_UNET, _FIRST = "model.params.unet_config.params", "model.params.first_stage_config.params"
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
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--config {path} cannot be read as YAML: {reason}") from None
        config = cls(path, content if isinstance(content, dict) else {})
        if not isinstance(config.get("model.params.unet_config.params"), dict):
            raise UsageError(f"--config {path} has no model.params.unet_config.params; it is no config of a model")
        config._refuse_unknown_targets()
        return config

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self.content
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def model_spec(self, checkpoint: str) -> ModelSpec:
        """The checkpoint, with what only the config tells: what is predicted, and where the vocabulary is."""
        kind = self.get("model.params.parameterization", "eps")
        if kind not in _PREDICTIONS:
            raise UsageError(
                f"--config {self.path}: model.params.parameterization is {kind!r}; it must be {', '.join(_PREDICTIONS)}"
            )
        return ModelSpec(
            model=checkpoint,
            prediction_type=_PREDICTIONS[kind],
            tokenizer=self._tokenizer(),
            timestep_spacing="original",
        )

    def check(self, model: ModelDescription) -> None:
        """Raises UsageError that names the first number in which config and checkpoint differ."""
        for path, expected in self._facts(model):
            said = self.get(path)
            if said is not None and not _same(said, expected):
                raise UsageError(
                    f"--config {self.path} says {path}: {said!r}, but {model.path} has {expected!r}: they are not of "
                    "one model; give the config that belongs to the checkpoint"
                )

    def _tokenizer(self) -> str | None:
        """Our own key, or what the original's CLIP embedder takes; OpenCLIP's `version` means its weights."""
        stage = "model.params.cond_stage_config"
        is_clip = str(self.get(f"{stage}.target", "")).endswith(".FrozenCLIPEmbedder")
        name = self.get(f"{stage}.params.tokenizer") or (self.get(f"{stage}.params.version") if is_clip else None)
        return None if name is None else str(name)

    def _refuse_unknown_targets(self) -> None:
        for path, known in _KNOWN_TARGETS.items():
            target = self.get(f"{path}.target")
            if target is not None and str(target).rpartition(".")[2] not in known:
                raise UsageError(f"--config {self.path} has {path}.target: {target!r}; known are {', '.join(known)}")

    def _facts(self, model: ModelDescription) -> Iterator[tuple[str, Any]]:
        """Every path that is compared, and what the checkpoint has there in the config's own terms."""
        blueprint = model.layout.blueprint
        unet, vae, scheduler = blueprint.unet, blueprint.vae, blueprint.scheduler
        yield "model.params.timesteps", scheduler.num_train_timesteps
        yield "model.params.linear_start", scheduler.beta_start
        yield "model.params.linear_end", scheduler.beta_end
        yield "model.params.channels", vae.unet_channels
        yield "model.params.scale_factor", vae.scaling_factor
        yield f"{_UNET}.in_channels", unet.in_channels
        yield f"{_UNET}.out_channels", unet.out_channels
        yield f"{_UNET}.model_channels", unet.channels[0]
        yield f"{_UNET}.channel_mult", _multiples(unet.channels)
        yield f"{_UNET}.num_res_blocks", unet.layers_per_block
        yield (
            f"{_UNET}.attention_resolutions",
            sorted((2**level for level, attends in enumerate(unet.cross_attention) if attends), reverse=True),
        )
        if self.get(f"{_UNET}.num_heads", -1) != -1:
            yield f"{_UNET}.num_heads", unet.heads[0] if len(set(unet.heads)) == 1 else list(unet.heads)
        if self.get(f"{_UNET}.num_head_channels", -1) != -1:
            widths = sorted({width // heads for width, heads in zip(unet.channels, unet.heads, strict=True)})
            yield f"{_UNET}.num_head_channels", widths[0] if len(widths) == 1 else widths
        yield f"{_UNET}.context_dim", unet.context_dim
        yield f"{_UNET}.use_linear_in_transformer", unet.linear_projection
        yield f"{_FIRST}.embed_dim", vae.unet_channels
        yield f"{_FIRST}.n_embed", vae.codebook_size
        yield f"{_FIRST}.ddconfig.z_channels", vae.latent_channels
        yield f"{_FIRST}.ddconfig.ch", vae.channels[0]
        yield f"{_FIRST}.ddconfig.ch_mult", _multiples(vae.channels)
        yield f"{_FIRST}.ddconfig.num_res_blocks", vae.layers_per_block


def _multiples(widths: tuple[int, ...]) -> list[float]:
    return [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths]


def _same(said: Any, expected: Any) -> bool:
    if isinstance(said, list) and isinstance(expected, list):
        return len(said) == len(expected) and all(map(_same, said, expected))
    if isinstance(expected, int | float) and not isinstance(said, list | dict):
        try:
            # PyYAML takes numbers such as 1e-4 for words.
            return math.isclose(float(said), expected)
        except ValueError:
            return False
    return bool(said == expected)
