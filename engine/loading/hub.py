"""Models by hub id, through huggingface_hub and its settings (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE)."""

from __future__ import annotations

import re
from logging import ERROR
from pathlib import Path

from latentmill.engine.families.table import FAMILIES
from latentmill.engine.guards.safety import CHECKERS
from latentmill.engine.loading.folder import pipeline_parts
from latentmill.engine.loading.vocabulary import TOKENIZER_FILES
from latentmill.engine.types import EngineError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIGS = ("model_index.json", "*/config.json", "scheduler/*.json")
_CHECKERS = tuple(name for entry in CHECKERS.values() for name in entry.files)
_ENCODERS = [encoder for family in FAMILIES for encoder in family.text_encoders]
_TOKENIZERS = tuple(f"{encoder.tokenizer}/{name}" for encoder in _ENCODERS for name in TOKENIZER_FILES)
_DENOISERS = {family.denoiser.component for family in FAMILIES}
_AUTOENCODERS = {family.autoencoder.component for family in FAMILIES}
_PARTS = sorted(_DENOISERS | _AUTOENCODERS | {encoder.component for encoder in _ENCODERS})
_SAFETENSORS = tuple(
    f"{part}/{name}{ending}"
    for part in _PARTS
    for name in ("diffusion_pytorch_model", "model")
    for ending in (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
)
_PICKLES = tuple(f"{part}/{name}.bin" for part in _PARTS for name in ("diffusion_pytorch_model", "pytorch_model"))
_READ = ("json", "safetensors", "txt", "model", "jinja")
"""What is fetched of every part of a pipeline that runs by the library diffusers."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, as models on the hub have."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_model(repo: str, revision: str | None) -> Path:
    """The local snapshot of a diffusers repository, fetched where it is not there yet: safetensors if it has them.

    Raises EngineError that says which files, from where, and how to use a local copy instead.
    """
    needed = (
        "model_index.json, and of each part (scheduler, tokenizer, text encoder, denoiser, autoencoder) its config and "
        "its weights as .safetensors or .bin"
    )
    index = _snapshot(repo, revision, ("model_index.json",), needed, "diffusers folder") / "model_index.json"
    other = pipeline_parts(index) if index.is_file() else ()
    if other:
        patterns = ("model_index.json", *(f"{part}/*.{suffix}" for part in other for suffix in _READ))
        return _snapshot(repo, revision, patterns, needed, "diffusers folder")
    folder = _snapshot(repo, revision, (*_CONFIGS, *_CHECKERS, *_TOKENIZERS, *_SAFETENSORS), needed, "diffusers folder")
    if not any(any((folder / part).glob("diffusion_pytorch_model*.safetensors")) for part in _DENOISERS):
        folder = _snapshot(repo, revision, (*_CONFIGS, *_CHECKERS, *_TOKENIZERS, *_PICKLES), needed, "diffusers folder")
    return folder


def fetch_tokenizer(repo: str) -> Path:
    """The local snapshot of a tokenizer's files. Raises EngineError as `fetch_model` does."""
    needed = "the tokenizer's vocab.json and merges.txt (CLIP), vocab.txt (BERT) or tokenizer.json (T5)"
    return _snapshot(repo, None, TOKENIZER_FILES, needed, "folder, as tokenizer")


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...], needed: str, local_form: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # the client logs each failed attempt; the error below reports it once
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    # The client raises its own errors, its transport's and the disk's; in each case the model is not here.
    except Exception as error:  # noqa: BLE001 - it becomes one line
        at = f" at revision {revision}" if revision else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"{repo}{at} is not in the cache {constants.HF_HUB_CACHE} and cannot be fetched. Needed: {needed}. Run "
            f"`hf download {repo}{f' --revision {revision}' if revision else ''}` where the hub can be reached, or "
            f"give the path of a local copy ({local_form}). The hub's client said: {reason}"
        ) from None
    finally:
        logging.set_verbosity(before)
