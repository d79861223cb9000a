"""Folders of pipelines that the engine does not run itself: what their files say, without torch or diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentmill.engine.guards.safety import checker_files
from latentmill.engine.loading.config import LEVELS_LIMIT, WIDTH_LIMIT
from latentmill.engine.loading.fields import Fields
from latentmill.engine.loading.files import read_json
from latentmill.engine.loading.folder import pipeline_parts
from latentmill.engine.loading.vocabulary import check_tokenizer_config
from latentmill.engine.types import EngineError, ModelSpec

_DENOISERS = ("transformer", "unet", "prior", "decoder")
_AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")
_USUAL_SIDE = 1024
_NUMBERS = ("latent_channels", "z_dim", "in_channels", "spatial_compression_ratio", "scale_factor_spatial")
_SIZES = ("sample_size", "patch_size", "all_patch_size")
_LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
_COUNTS = ("layers", "blocks", "depth")
COUNT_LIMIT = 1024
"""Layers or blocks that a part's config may ask for under any name: the library builds them before it reads weights."""

OPTIONAL = ("safety_checker", "feature_extractor")
"""Parts that are not used to make a picture."""

_IGNORED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".md", ".py")
"""Files that are never read: safetensors alone are loaded, and no code."""


@dataclass(frozen=True, kw_only=True)
class DiffusersFolder:
    """A whole diffusers folder. `components` maps each part that is there to its (library, class)."""

    path: Path
    class_name: str
    components: Mapping[str, tuple[str, str]]

    @cached_property
    def files(self) -> dict[str, Path]:
        """All that can change a pixel or a verdict, by relative path, sorted. Raises EngineError if one is missing."""
        found = [self.path / "model_index.json"]
        for name, (_, kind) in self.components.items():
            files = [path for path in sorted((self.path / name).rglob("*")) if _counts(path)]
            if name not in OPTIONAL:
                _check_whole(self.path / name, kind, files)
            check_tokenizer_config(self.path / name / "tokenizer_config.json")
            found += files
        files_of_parts = {path.relative_to(self.path).as_posix(): path for path in found}
        # The engine's checker reads these even if the pipeline's index does not name them.
        return dict(sorted((files_of_parts | checker_files(self.path)).items()))

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config; empty where there is none."""
        path = self.path / "scheduler" / "scheduler_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def prediction_type(self) -> str:
        """As the scheduler's config has it; flow matching has no such entry."""
        usual = "flow" if "Flow" in str(self.scheduler.get("_class_name", "")) else "epsilon"
        return str(self.scheduler.get("prediction_type", usual))

    @property
    def latent_channels(self) -> int:
        """The autoencoder's, else what the denoiser takes; 0 if neither says."""
        autoencoder = self._config(_AUTOENCODERS)
        return int(
            autoencoder.get("latent_channels")
            or autoencoder.get("z_dim")
            or self._config(_DENOISERS).get("in_channels", 0)
        )

    @property
    def factor(self) -> int:
        """Pixels per cell of the autoencoder's latents, times the cells per patch of the denoiser.

        If the denoiser takes 4 or 9 times the latent channels, its pipeline folds patches into channels; otherwise its
        config has the patch size. The defaults are 8 pixels and 1 cell.
        """
        autoencoder, denoiser = self._config(_AUTOENCODERS), self._config(_DENOISERS)
        folded, rest = divmod(int(denoiser.get("in_channels") or 0), self.latent_channels or 1)
        side = math.isqrt(folded)
        patch = side if folded > 1 and not rest and side * side == folded else _patch_size(denoiser)
        return _pixels_per_cell(autoencoder) * patch

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height): the denoiser's `sample_size` in cells, else 1024, rounded to what `factor` allows."""
        cells = self._config(_DENOISERS).get("sample_size")
        sides = cells if isinstance(cells, list) else [cells, cells]
        scale = _pixels_per_cell(self._config(_AUTOENCODERS))
        height, width = (
            max(1, round((side * scale if isinstance(side, int) else _USUAL_SIDE) / self.factor)) * self.factor
            for side in sides[-2:]
        )
        return width, height

    @property
    def guidance_is_embedded(self) -> bool | None:
        """Whether the denoiser was distilled to take guidance as an input; None if its config has no such entry."""
        embedded = self._config(_DENOISERS).get("guidance_embeds")
        return None if embedded is None else bool(embedded)

    def _config(self, names: Sequence[str]) -> dict[str, Any]:
        """The config of the first of these parts that is there."""
        present = (self.path / name / "config.json" for name in names if name in self.components)
        return next((read_json(path) for path in present), {})


class PlainTokenizer:
    """Counts tokens by a tokenizer of any kind."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, without marks and without what a pipeline writes around a prompt."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


def find_pipeline(spec: ModelSpec) -> DiffusersFolder | None:
    """The folder of a pipeline that the engine does not run itself; None for anything else.

    Raises EngineError for a broken folder, and for options that only the engine's own models take.
    """
    folder = Path(spec.model)
    if not (folder / "model_index.json").is_file():
        return None
    parts = pipeline_parts(folder / "model_index.json")
    if not parts:
        return None
    index = read_json(folder / "model_index.json")
    name = str(index["_class_name"])
    for option in ("tokenizer", "prediction_type", "timestep_spacing"):
        if getattr(spec, option) is not None:
            raise EngineError(f"{option} is {getattr(spec, option)!r}, but {folder} is a {name}: leave it out")
    components = {part: (str(index[part][0]), str(index[part][1])) for part in parts}
    for config in (folder / part / "config.json" for part in parts):
        if config.is_file():
            _check_config(config)
    return DiffusersFolder(path=folder, class_name=name, components=components)


def _check_config(path: Path) -> None:
    """Raises EngineError for what is not a number, and for numbers that would make a part too large to build."""
    config = read_json(path)
    fields = Fields(config, str(path))
    for name in _NUMBERS:
        fields.whole(name, 0, WIDTH_LIMIT, least=0)
    for name in _SIZES:
        if isinstance(config.get(name), list):
            fields.wholes(name, (), WIDTH_LIMIT, length=3)
        else:
            fields.whole(name, 1, WIDTH_LIMIT)
    for name in _LEVELS:
        if isinstance(config.get(name), list) and len(config[name]) > LEVELS_LIMIT:
            raise fields.refusal(name, f"at most {LEVELS_LIMIT} levels")
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if any(word in name for word in _COUNTS) and any(isinstance(n, int) and n > COUNT_LIMIT for n in counts):
            raise fields.refusal(name, f"at most {COUNT_LIMIT}")


def load_first_tokenizer(pipeline: DiffusersFolder) -> PlainTokenizer:
    """The pipeline's first tokenizer, by name. Raises EngineError where it has none."""
    from transformers import AutoTokenizer

    names = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    if not names:
        raise EngineError(f"{pipeline.path}/model_index.json names no tokenizer: {pipeline.class_name} takes no text")
    return PlainTokenizer(
        AutoTokenizer.from_pretrained(pipeline.path / names[0], local_files_only=True, trust_remote_code=False)
    )


def has_weights(kind: str) -> bool:
    """Whether a part of this class is a network."""
    return not any(word in kind for word in ("Scheduler", "Tokenizer", "Processor", "Extractor"))


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix not in _IGNORED


def _check_whole(folder: Path, kind: str, files: Sequence[Path]) -> None:
    """Every part has its files, every network its weights, every index of weights its shards."""
    if not files:
        raise EngineError(f"{folder} is missing or empty: the folder is not a whole diffusers model folder")
    for index in (path for path in files if path.name.endswith(".safetensors.index.json")):
        weights = read_json(index).get("weight_map")
        shards = {str(name) for name in weights.values()} if isinstance(weights, dict) else set()
        # A name that leads out of this folder would be in no digest.
        missing = sorted(shards - {path.relative_to(folder).as_posix() for path in files})
        if missing:
            raise EngineError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    if has_weights(kind) and not any(path.suffix == ".safetensors" for path in files):
        raise EngineError(f"{folder} has no weights: looked for *.safetensors (pickled weights are not read)")


def _pixels_per_cell(autoencoder: Mapping[str, Any]) -> int:
    """How much an autoencoder shrinks a side: as its config says, or by 2 for each level but the first."""
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if isinstance(autoencoder.get(name), int):
            return int(autoencoder[name])
    for name in ("block_out_channels", "encoder_block_out_channels"):
        if isinstance(autoencoder.get(name), list):
            return int(2 ** (len(autoencoder[name]) - 1))
    if isinstance(autoencoder.get("dim_mult"), list):
        return int(2 ** (len(autoencoder["dim_mult"]) - 1))
    return 8


def _patch_size(denoiser: Mapping[str, Any]) -> int:
    """The side of a patch in cells: the largest, if there are several."""
    size = denoiser.get("patch_size") or denoiser.get("all_patch_size") or 1
    return max(map(int, size)) if isinstance(size, list) else int(size)
