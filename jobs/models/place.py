"""A model on this machine: its current files for planning, exactly the planned files for loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from latentmill.engine import EngineError, ModelSpec, describe_model
from latentmill.jobs.errors import JobError
from latentmill.jobs.models.cache import fetch_newest, hold, is_single_file, is_url
from latentmill.jobs.models.digests import file_digests
from latentmill.jobs.models.node import node_name
from latentmill.jobs.models.resolved import ResolvedModel

_TOKENIZER = "tokenizer/"


class ModelMismatchError(JobError):
    """The model's files on this node differ from the planned ones, so its pictures would differ."""


def place_newest(spec: ModelSpec) -> tuple[ModelSpec, ModelSpec]:
    """The model's name on any node, and its path on this one, fetched if necessary."""
    named = local = spec
    if is_url(spec.model):
        if is_single_file(spec.model):
            folder = fetch_newest(spec.model)
            local = replace(local, model=str(folder / spec.model.rpartition("/")[2]))
        else:
            local = replace(local, model=str(fetch_newest(spec.model, lambda outline: _claim(spec.model, outline))))
    if spec.tokenizer is not None and is_url(spec.tokenizer):
        url = spec.tokenizer.rstrip("/")
        folder = fetch_newest(url, lambda outline: _claim_vocabulary(url, outline))
        # users may name a model's folder; the tokenizer is inside
        named = replace(named, tokenizer=f"{url}/tokenizer" if (folder / "tokenizer").is_dir() else url)
        local = replace(local, tokenizer=str(folder))
    return named, _with_files(local, fetch_newest)


def place_model(model: ResolvedModel) -> ModelSpec:
    """Afterwards the returned spec leads to the planned model, verified by hash.

    A model at a URL is downloaded once per node; any other is used in place. Files are hashed once per node, and again
    when one was touched. Raises ModelMismatchError that names the file, both digests and the node; StorageError if a
    model cannot be fetched.
    """
    try:
        spec = _held(model)
        described = describe_model(spec)
        found = file_digests({name: path for name, path in described.paths.items() if name in model.files})
    except (EngineError, OSError) as error:
        raise ModelMismatchError(
            f"the planned model {model.source} is not on {node_name()}: {' '.join(str(error).split())}"
        ) from error
    for name in sorted(model.files):
        path = described.paths.get(name)
        if path is None:
            raise ModelMismatchError(
                f"{name} of the model {model.source} is not in {described.path} on {node_name()}; copy it there, or "
                f"give a URL as --model"
            )
        if found[name] != model.files[name]:
            raise ModelMismatchError(
                f"{path} on {node_name()} is not the planned file: sha256 {model.files[name]} was planned, "
                f"{found[name]} is there; {_remedy(model, path)}"
            )
    beside = sorted(described.paths.keys() - model.files.keys())
    if beside:
        raise ModelMismatchError(
            f"{described.paths[beside[0]]} on {node_name()} was no part of the model when the job was planned; remove "
            f"it, or use a new --out"
        )
    return replace(spec, model=str(described.path), revision=None)


def _held(model: ResolvedModel) -> ModelSpec:
    """The model with its URLs replaced by local paths."""
    spec = model.spec
    vocabulary = {name: digest for name, digest in model.files.items() if name.startswith(_TOKENIZER)}
    if is_url(spec.model):
        if is_single_file(spec.model):
            name = spec.model.rpartition("/")[2]
            spec = replace(spec, model=str(hold(spec.model, {name: model.files[name]}) / name))
        else:
            files = {name: digest for name, digest in model.files.items() if not name.startswith(_beside(model))}
            spec = replace(spec, model=str(hold(spec.model, files)))
    if spec.tokenizer is not None and is_url(spec.tokenizer):
        files = {name.removeprefix(_TOKENIZER): digest for name, digest in vocabulary.items()}
        spec = replace(spec, tokenizer=str(hold(spec.tokenizer, files)))
    return _with_files(spec, lambda url: hold(url, _file_at(url, model)))


def _with_files(spec: ModelSpec, fetch: Callable[[str], Path]) -> ModelSpec:
    """The model with its LoRAs and its other autoencoder on this machine: what lies at a URL is one file."""

    def local(place: str) -> str:
        if not is_url(place):
            return place
        if not is_single_file(place):
            raise EngineError(f"{place} is not a .safetensors file, and nothing else is fetched in its place; name one")
        return str(fetch(place) / place.rpartition("/")[2])

    return replace(
        spec,
        loras=tuple(replace(lora, path=local(lora.path)) for lora in spec.loras),
        vae=None if spec.vae is None else local(spec.vae),
        preview_decoder=None if spec.preview_decoder is None else local(spec.preview_decoder),
    )


def _beside(model: ResolvedModel) -> tuple[str, ...]:
    """How the names of files begin that do not lie at the model's own place."""
    return ("loras/", "vae/") if model.vae or model.preview_decoder else ("loras/",)


def _file_at(url: str, model: ResolvedModel) -> dict[str, str]:
    """The planned file at the URL of a LoRA or of an autoencoder."""
    name = url.rpartition("/")[2]
    lora = next((lora for lora, place in model.loras.items() if place == url), None)
    return model.lora_files(lora) if lora is not None else {name: model.files[f"vae/{name}"]}


def _claim(url: str, outline: Path) -> Iterable[str]:
    try:
        return describe_model(str(outline)).paths
    except EngineError as error:
        raise EngineError(str(error).replace(str(outline), url)) from None


def _claim_vocabulary(url: str, outline: Path) -> Iterable[str]:
    folder = outline / "tokenizer" if (outline / "tokenizer").is_dir() else outline
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in {".json", ".txt"}]
    if not files:
        raise EngineError(f"{url} holds no tokenizer: looked for vocab.json and merges.txt, or vocab.txt")
    return [path.relative_to(outline).as_posix() for path in files]


def _remedy(model: ResolvedModel, path: Path) -> str:
    if Path(model.spec.model).exists():
        return "copy the planned one there again, or use a new --out for this one"
    return f"remove {path.resolve()}, so that it is fetched again"
