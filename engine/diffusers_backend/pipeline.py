"""Any other text-to-image pipeline, run by the library diffusers: the optional extra `latentmill[diffusers]`.

Nothing here is specific to a pipeline: its call signature says what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from latentmill.engine.device import widened
from latentmill.engine.diffusers_backend.folder import (
    OPTIONAL,
    DiffusersFolder,
    PlainTokenizer,
    has_weights,
    load_first_tokenizer,
)
from latentmill.engine.model import Drawn
from latentmill.engine.types import EngineError, GenerationRequest

_NEEDED = ("prompt", "generator", "num_inference_steps", "width", "height", "output_type")
_SHORT, _LONG = "a", "a red circle left of a blue square " * 5


class DiffusersPipeline:
    """A pipeline at one precision, with its own defaults for everything that a request does not say.

    Steps and guidance are one number for a whole batch, so all rows of a batch share them. If the number of tokens
    fixes the shape of the denoiser's input, they have the same shape as well. So a row's bits do not depend on its
    neighbours. The noise is drawn by the pipeline, in its own precision, from each row's CPU generator.
    """

    def __init__(self, pipeline: Any, folder: DiffusersFolder, device: torch.device) -> None:
        self._pipeline = pipeline
        self._name = folder.class_name
        self._device = device
        self._tokenizer: PlainTokenizer = load_first_tokenizer(folder)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self._guidance = _guidance_argument(parameters, folder)
        # If guidance is an input of the network, there is no unconditional pass that a negative prompt could change.
        embedded = self._guidance == "guidance_scale" and bool(folder.guidance_is_embedded)
        self._takes_negatives = "negative_prompt" in parameters and self._guidance is not None and not embedded
        self._shapes: dict[str, Hashable] = {}
        short, long = self._context_shape(_SHORT), self._context_shape(_LONG)
        self._one_shape = short == long
        self._decoded: Tensor | None = None
        self._watch_decoder()

    @property
    def refills(self) -> bool:
        """The loop is the pipeline's own: all rows of a batch go through it together, and the next batch waits."""
        return False

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """Loop, guidance, whether it has a negative prompt, and the shapes of its encoded prompts if shapes differ.

        Raises EngineError for what the pipeline has no argument for.
        """
        if request.image is not None:
            raise EngineError(
                f"{self._name} runs by the library diffusers, here from prompts alone; leave the image out"
            )
        if self._guidance is None and request.guided:
            raise EngineError(f"guidance_scale is {request.guidance_scale:g}, but {self._name} takes none; use 1")
        if request.negative_prompt and not self._takes_negatives:
            raise EngineError(f"{self._name} takes no negative prompt with these weights; leave it out")
        texts = [request.prompt, request.negative_prompt] if self._passes_negative(request) else [request.prompt]
        counted = [self.count_tokens(text) for text in texts]  # a text that cannot be tokenised fails here, alone
        shapes = () if self._one_shape else tuple(map(self._context_shape, texts))
        return request.loop, request.guidance_scale, len(counted), shapes

    def count_tokens(self, prompt: str) -> int:
        """Tokens by the pipeline's first tokenizer, before truncation and without marks."""
        return self._tokenizer.count([prompt])[0]

    @contextmanager
    def in_fp32(self) -> Iterator[DiffusersPipeline]:
        """The same weights, widened in place as long as the context lasts."""
        with widened(part for part in self._pipeline.components.values() if isinstance(part, nn.Module)):
            yield self

    def sample(
        self, rows: Sequence[GenerationRequest], slots: int, noise: Sequence[Tensor] | None = None
    ) -> Iterator[Drawn]:
        """Pictures of up to `slots` rows of one shape and batch key, in one batch padded by its last row.

        Raises EngineError if the pipeline refuses one of them.
        """
        if noise is not None:
            raise EngineError(f"{self._name} draws its own noise; none can be given to it")
        count = len(rows)
        pictures, finite = self._draw([*rows, *[rows[-1]] * (slots - count)])
        yield Drawn([*range(count)], [*range(count)], pictures[:count], finite[:count])

    def _draw(self, rows: Sequence[GenerationRequest]) -> tuple[Tensor, Tensor]:
        """`(n, 3, h, w) float32 in [0, 1]`, and which of them are finite, `(n,)`."""
        first = rows[0]
        arguments: dict[str, Any] = {
            "prompt": [row.prompt for row in rows],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.num_inference_steps,
            "generator": [torch.Generator("cpu").manual_seed(row.seed) for row in rows],
            "output_type": "pt",
        }
        if self._guidance is not None:
            arguments[self._guidance] = first.guidance_scale
        if self._passes_negative(first):
            arguments["negative_prompt"] = [row.negative_prompt for row in rows]
        self._decoded = None
        try:
            pictures = self._pipeline(**arguments).images
        except (ValueError, TypeError, AttributeError) as error:  # how pipelines refuse arguments
            raise EngineError(f"{self._name}: {type(error).__name__}: {error}") from error
        decoded = pictures if self._decoded is None else self._decoded
        expected = (len(rows), 3, first.height, first.width)
        if tuple(pictures.shape) != expected:
            raise EngineError(f"{self._name} made pictures of shape {tuple(pictures.shape)} instead of {expected}")
        finite = torch.isfinite(decoded).flatten(1).all(1) & torch.isfinite(pictures).flatten(1).all(1)
        return pictures.float().clamp(0, 1), finite

    def _passes_negative(self, request: GenerationRequest) -> bool:
        """An empty one is left out, unless guidance is off without one (true CFG)."""
        wanted = bool(request.negative_prompt) or self._guidance == "true_cfg_scale"
        return self._takes_negatives and request.guided and wanted

    def _context_shape(self, text: str) -> Hashable:
        """The shapes of a text's embeddings, or, if they are not available, the text itself: it gets its own batch."""
        if text not in self._shapes:
            if len(self._shapes) > 4096:
                self._shapes.clear()
            self._shapes[text] = self._encoded_shape(text)
        return self._shapes[text]

    @torch.inference_mode()
    def _encoded_shape(self, text: str) -> Hashable:
        encode = getattr(self._pipeline, "encode_prompt", None)
        if encode is None:
            return text
        parameters = inspect.signature(encode).parameters
        arguments = {name: None for name, entry in parameters.items() if entry.default is entry.empty}
        try:
            return _shapes(encode(**{**arguments, "prompt": [text], "device": self._device}))
        # Each pipeline has its own encode_prompt, which may need other arguments; the text then gets its own batch.
        except Exception:  # noqa: BLE001 - whatever it raises
            return text

    def _watch_decoder(self) -> None:
        """Keep the decoded picture before it is clamped to [0, 1]: infinities would become white."""
        processor = getattr(self._pipeline, "image_processor", None)
        if processor is None:
            return
        postprocess = processor.postprocess

        def watched(image: Tensor, *rest: Any, **options: Any) -> Any:
            self._decoded = image
            return postprocess(image, *rest, **options)

        processor.postprocess = watched


def library_version() -> str:
    """The version of diffusers that is installed."""
    return metadata.version("diffusers")


def load_pipeline(folder: DiffusersFolder, dtype: torch.dtype, device: torch.device) -> DiffusersPipeline:
    """Load the pipeline that the folder's model_index.json names, from safetensors alone and without running its code.

    Raises EngineError without the library diffusers, and for weights that do not fit.
    """
    name = folder.class_name
    try:
        import diffusers
        from diffusers.utils import logging
    except ImportError:
        raise EngineError(
            f"{folder.path} is a {name}, which runs by the library diffusers: pip install 'latentmill[diffusers]'"
        ) from None
    kind: Any = getattr(diffusers, name, None)
    if kind is None:
        raise EngineError(
            f"{folder.path} is a {name}, which diffusers {library_version()} does not have; install a later one"
        )
    logging.disable_progress_bar()
    try:
        _check_signature(name, inspect.signature(kind.__call__).parameters)
        # The pipeline's own checker would blacken pictures without a record; the engine's checker judges them.
        given: dict[str, Any] = dict.fromkeys(part for part in OPTIONAL if part in folder.components)
        given |= {part: _load_network(folder, part, dtype) for part in _networks(folder)}
        if "requires_safety_checker" in inspect.signature(kind).parameters:
            given["requires_safety_checker"] = False
        pipeline = kind.from_pretrained(folder.path, local_files_only=True, use_safetensors=True, dtype=dtype, **given)
    except EngineError:
        raise
    # ImportError is how the library asks for another package.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{folder.path} cannot be loaded by diffusers {library_version()}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return DiffusersPipeline(pipeline.to(device), folder, device)


def _networks(folder: DiffusersFolder) -> list[str]:
    """The parts whose weights are checked name by name: networks of the two libraries themselves."""
    return [
        part
        for part, (library, kind) in folder.components.items()
        if library in ("diffusers", "transformers") and part not in OPTIONAL and has_weights(kind)
    ]


def _load_network(folder: DiffusersFolder, part: str, dtype: torch.dtype) -> nn.Module:
    """One network. Raises EngineError if a weight is missing: the libraries fill it with random numbers and warn."""
    import diffusers
    import transformers

    library, name = folder.components[part]
    kind = getattr(diffusers if library == "diffusers" else transformers, name)
    network, info = kind.from_pretrained(
        folder.path / part, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
    )
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise EngineError(f"{folder.path / part} lacks {len(missing)} weights of {name}, the first: {missing[0]}")
    checked: nn.Module = network.eval()
    return checked


def _check_signature(name: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raises EngineError for a pipeline that does not make one picture of one prompt."""
    lacking = [argument for argument in _NEEDED if argument not in parameters]
    if lacking:
        raise EngineError(f"{name} is no text-to-image pipeline: its call takes no {', '.join(lacking)}")
    required = [
        argument
        for argument, entry in parameters.items()
        if entry.default is entry.empty
        and entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)
        and argument not in ("self", "prompt")
    ]
    if required or "num_frames" in parameters:
        raise EngineError(f"{name} is no text-to-image pipeline: its call takes {', '.join(required) or 'num_frames'}")


def _guidance_argument(parameters: Mapping[str, inspect.Parameter], folder: DiffusersFolder) -> str | None:
    """The argument that steers the pipeline with these weights.

    If there are two, `guidance_scale` is an input of networks that were distilled for it, and has no effect on others:
    those are guided by an unconditional pass, `true_cfg_scale`.
    """
    if "true_cfg_scale" in parameters and not folder.guidance_is_embedded:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in parameters else None


def _shapes(encoded: Any) -> Hashable:
    """The shapes of all tensors in nested lists and tuples."""
    if isinstance(encoded, Tensor):
        return tuple(encoded.shape)
    return tuple(map(_shapes, encoded)) if isinstance(encoded, list | tuple) else None
