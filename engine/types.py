"""The nouns of the engine: what is asked for, what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pixels: TypeAlias = "NDArray[np.uint8]"
Mask: TypeAlias = "NDArray[np.bool_]"
Precision = Literal["fp32", "fp16", "bf16", "fp32-retry"]
Status = Literal["ok", "flagged", "failed"]

PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""What a result calls each dtype that a model can be loaded in."""

SEED_LIMIT = 2**32
"""torch's CPU generator ignores the bits above the 32nd, so larger seeds would silently collide."""

PROMPT_SYNTAXES = ("plain", "a1111", "novelai")
"""What `ModelSpec.prompt_syntax` takes: how brackets in prompts are read (see engine/text/prompts.py)."""

LONG_PROMPTS = ("truncate", "chunk", "error")
"""What `ModelSpec.long_prompts` takes: what happens to a prompt with more tokens than the text encoder takes."""

EXECUTIONS = ("eager", "graphs", "compiled")
"""How a denoiser is run: operator by operator, as CUDA graphs of the same kernels, or by what torch.compile makes."""

LORA_NAME = r"\w(?:[\w .+-]{0,62}[\w.+-])?"
"""What a LoRA may be called, as a pattern."""

LORA_SCALE_LIMIT = 20.0
"""The largest scale of a LoRA, in both directions: sliders go to about 8."""

LORAS_LIMIT = 16
"""LoRAs that one model may be loaded with."""

WATERMARK_METHODS = ("dwtDct", "dwtDctSvd")
WATERMARK_MIN_PIXELS = 256 * 256


class EngineError(ValueError):
    """A request or a model that the engine refuses: the message names the value, the limit and the remedy."""


class ImageSource(Protocol):
    """Where a request's picture comes from; the engine reads it when it begins with the request."""

    def read(self, width: int, height: int) -> SourceImage:
        """The picture at that size. Raises EngineError that says why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SourceImage:
    """A picture to start from: `pixels (h, w, 3) uint8` RGB. Where a `mask (h, w)` is False it stays as it is."""

    pixels: Pixels
    mask: Mask | None = None

    def read(self, width: int, height: int) -> SourceImage:
        """Itself. Raises EngineError if it has another size."""
        for name, shape in (("image", self.pixels.shape[:2]), ("mask", None if self.mask is None else self.mask.shape)):
            if shape is not None and shape != (height, width):
                found = "x".join(map(str, reversed(shape)))
                raise EngineError(f"the {name} is {found}, the request {width}x{height}; resize it")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One image to be made. Sizes are in pixels; `eta` is the eta of DDIM (arXiv:2010.02502, eq. 16).

    `loras` are scales by the names of the model's LoRAs; one that is not named here has the scale that the prompt's tag
    gives it, if the model reads prompts as A1111 does, else 0.

    With an `image`, its latents are noised and only the last steps taken, `strength` being their share of all
    (arXiv:2108.01073): at 1 little is left of it but its layout.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 42
    width: int
    height: int
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    eta: float = 0.0
    loras: tuple[tuple[str, float], ...] = ()
    image: ImageSource | None = None
    strength: float | None = None

    @property
    def guided(self) -> bool:
        """Whether the unconditional pass runs (diffusers' rule: only above 1)."""
        return self.guidance_scale > 1.0

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What fixes the shape of a batch; only requests with one shape share a batch."""
        return (self.width, self.height, self.guided)

    @property
    def loop(self) -> tuple[str, int] | tuple[str, int, int]:
        """What requests share that can take every step together; the last number counts the steps from an image."""
        steps = self.num_inference_steps
        if self.strength is None:
            return (self.sampler, steps)
        return (self.sampler, steps, steps_from_image(steps, self.strength))


def steps_from_image(num_inference_steps: int, strength: float) -> int:
    """How many steps are taken from an image: rounded down, as the original script and diffusers do."""
    return min(int(num_inference_steps * strength), num_inference_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetyVerdict:
    """What the safety checker found in one picture. `score` is the checker's highest score."""

    checker: str
    score: float | None
    flagged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class UncheckedResult:
    """One sampled request that no checker has judged yet: `Engine.check` alone makes a result of it.

    It has neither a status nor `pixels`, so that it cannot be taken for a result. `judged` is what the checker sees and
    `kept` what is handed on, each `(height, width, 3) uint8` RGB; both are None exactly when `error` says why.
    """

    judged: Pixels | None
    kept: Pixels | None
    error: str | None
    prompt_tokens: int
    precision: Precision
    batch_size: int
    batch_slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationResult:
    """One finished request.

    `pixels` is `(height, width, 3) uint8` RGB, or None exactly when `error` says why there is no picture. A flagged
    picture comes back with its pixels; the caller decides what to do with them. `prompt_tokens` counts the prompt's
    tokens before truncation, without start and end marks.
    """

    pixels: Pixels | None
    error: str | None
    safety: SafetyVerdict | None
    prompt_tokens: int
    precision: Precision
    batch_size: int
    batch_slot: int

    @property
    def status(self) -> Status:
        """`ok` only for pixels that a checker passed, or that the caller chose not to have checked."""
        if self.error is not None or self.pixels is None or self.safety is None:
            return "failed"
        return "flagged" if self.safety.flagged else "ok"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """A LoRA (arXiv:2106.09685) by the name that requests give its scale by: a `.safetensors` file, or its folder.

    With `merged` it is added to the weights at that scale, which all requests must have then: faster, by other bits.
    """

    name: str
    path: str
    merged: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What to load, and the checker that goes with it.

    `model` is a diffusers folder, an original `.safetensors` or `.ckpt` file, or a hub id at a `revision`. A single
    file holds no vocabulary: `tokenizer` names a folder or hub id (default: the one its family was trained with). A
    file without text encoders or autoencoder takes them from there, a diffusers folder of its family. It does not hold
    its schedule either: set `prediction_type` and `timestep_spacing` where they are not the usual ones. The spacing
    (`leading`, `trailing`, `linspace`, or `original` for the original command's) also replaces a folder's.
    `safety` is `auto` (the folder's own `safety_checker/` if it has one, else open-nsfw), `open-nsfw`,
    `clip-concepts` or `none`. `safety_threshold` is the open-nsfw score from which a picture is flagged.

    `prompt_syntax` says how brackets are read. `long_prompts` says what happens to more tokens than the text encoder
    takes: cut (`truncate`), encoded in several chunks side by side (`chunk`), or refused (`error`). `loras` are loaded
    beside the weights: each request says how strongly each counts. `vae` is an autoencoder in place of the model's own,
    `preview_decoder` a tiny decoder (TAESD) in its place: each a diffusers folder or a `.safetensors` file.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    safety: str = "auto"
    safety_threshold: float = 0.8
    prompt_syntax: str = "plain"
    long_prompts: str = "truncate"
    loras: tuple[LoraSpec, ...] = ()
    vae: str | None = None
    preview_decoder: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OriginalModelSpec(ModelSpec):
    """A single file as the original command loads it: with what only that command's config tells, by its names.

    The defaults are those of the original's constructors. `use_ema` samples with the running average of the U-Net's
    weights (`model_ema.*`), which the file must hold then. The schedule counts only where the file has no
    `alphas_cumprod` of its own; its names are the original's (see `engine/loading/original.py`).
    """

    use_ema: bool = True
    scale_factor: float = 1.0
    timesteps: int = 1000
    beta_schedule: str = "linear"
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    cosine_s: float = 8e-3
