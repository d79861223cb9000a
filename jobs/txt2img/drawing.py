"""The original command: batches of pictures one after another, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentmill.engine import (
    EMBEDDED_MODEL,
    SEED_LIMIT,
    WATERMARK_MIN_PIXELS,
    EngineError,
    GenerationRequest,
    GenerationResult,
    ModelDescription,
    ModelSpec,
    check_steps,
    describe_model,
)
from latentmill.engine.types import Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.txt2img.config import CompVisConfig, find_config
from latentmill.jobs.txt2img.files import OutputFolder, draw_grid, grid_size
from latentmill.jobs.txt2img.options import DEFAULT_CKPT, DEFAULT_CONFIG, Txt2ImgOptions

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.engine import Engine, NoiseStream

WATERMARK, WATERMARK_METHOD = "StableDiffusionV1", "dwtDct"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request(GenerationRequest):
    """Guided below 1 as well, where the original still mixes both predictions."""

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Txt2ImgPlan:
    """All decisions before a network is loaded. `batches` holds the prompts of one iteration."""

    options: Txt2ImgOptions
    spec: ModelSpec
    model: ModelDescription
    embedded: bool
    width: int
    height: int
    batches: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """Pictures in all."""
        return self.options.n_iter * sum(map(len, self.batches))

    @property
    def per_row(self) -> int:
        """Pictures in a row of the grid."""
        return self.options.n_rows if self.options.n_rows > 0 else self.options.n_samples

    @property
    def timesteps(self) -> int:
        """How many timesteps the original's spacing makes of ddim_steps: every (T // S)-th one."""
        total = self.model.num_train_timesteps
        return len(range(0, total, total // self.options.ddim_steps))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of one batch: (n, c, h, w)."""
        factor = self.model.factor
        channels = self.model.latent_channels
        return self.options.n_samples, channels, self.height // factor, self.width // factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Txt2ImgSummary:
    """What was done. `failures` are the reasons of pictures that could not be made or checked, and are black."""

    samples: tuple[Path, ...]
    grid: Path | None
    flagged: int
    failures: tuple[str, ...]
    cut_prompts: int

    @property
    def exit_code(self) -> int:
        """0 only if every picture was made and checked."""
        return 1 if self.failures else 0


def plan_txt2img(options: Txt2ImgOptions) -> Txt2ImgPlan:
    """Decide everything and load nothing. Raises UsageError for what cannot be drawn or written."""
    # The original's own place is looked at first, so that its users' commands draw with their model.
    embedded = options.config is None and options.ckpt is None and not Path(DEFAULT_CKPT).is_file()
    spec, model = _embedded_model() if embedded else _checkpoint(options)
    width, height = _size(options, model, embedded=embedded)
    try:
        check_steps(options.sampler, model.layout.blueprint.scheduler, options.ddim_steps)
    except EngineError as error:
        raise UsageError(f"--ddim_steps: {error}") from None
    plan = Txt2ImgPlan(
        options=options,
        spec=spec,
        model=model,
        embedded=embedded,
        width=width,
        height=height,
        batches=_batches(options),
    )
    if options.rng == "per-sample" and options.seed + plan.count > SEED_LIMIT:
        raise UsageError(f"--seed {options.seed} and {plan.count} pictures pass the last seed, {SEED_LIMIT - 1}")
    _refuse_what_cannot_be_marked(plan)
    return plan


def _embedded_model() -> tuple[ModelSpec, ModelDescription]:
    spec = ModelSpec(model=str(EMBEDDED_MODEL), timestep_spacing="original")
    return spec, describe_model(spec)


def _checkpoint(options: Txt2ImgOptions) -> tuple[ModelSpec, ModelDescription]:
    config = CompVisConfig.read(find_config(options.config or DEFAULT_CONFIG))
    checkpoint = Path(options.ckpt or DEFAULT_CKPT)
    if not checkpoint.is_file():
        raise UsageError(
            f"--ckpt {checkpoint} is not a file; give a .ckpt or .safetensors file, or leave out --config, --ckpt and "
            "--laion400m for the model that ships with latentmill"
        )
    spec = config.model_spec(str(checkpoint))
    try:
        model = describe_model(spec)
    except EngineError as error:
        raise UsageError(f"--ckpt: {error}") from None
    config.check(model)
    return spec, model


def _size(options: Txt2ImgOptions, model: ModelDescription, *, embedded: bool) -> tuple[int, int]:
    """(width, height): what was given, else the original's 512, but the embedded model's own; whole latent cells."""
    for name, own, what in (("C", model.latent_channels, "latent channels"), ("f", model.factor, "pixels per cell")):
        given = getattr(options, name)
        value = given if given is not None or embedded else {"C": 4, "f": 8}[name]
        if value is not None and value != own:
            told = f"is {value}" if given is not None else f"is {value} by default"
            raise UsageError(f"--{name} {told}, but the model {model.name} has {own} {what}; give --{name} {own}")
    default = model.default_size if embedded else (512, 512)
    width, height = options.W or default[0], options.H or default[1]
    for name, side in (("W", width), ("H", height)):
        if side < model.factor:
            raise UsageError(f"--{name} is {side}; it must be {model.factor} or more, the pixels of one latent cell")
    return width // model.factor * model.factor, height // model.factor * model.factor


def _batches(options: Txt2ImgOptions) -> tuple[tuple[str, ...], ...]:
    """The prompts of one iteration: the prompt n_samples times, or the file's lines in tuples of n_samples."""
    size = options.n_samples
    if options.from_file is None:
        return ((options.prompt,) * size,)
    try:
        text = Path(options.from_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--from-file {options.from_file} cannot be read as UTF-8 text: {error}") from None
    lines = text.splitlines()
    if not lines:
        raise UsageError(f"--from-file {options.from_file} holds no line; give one prompt a line")
    return tuple(tuple(lines[start : start + size]) for start in range(0, len(lines), size))


def _refuse_what_cannot_be_marked(plan: Txt2ImgPlan) -> None:
    saved = [] if plan.options.skip_save else [("a picture", (plan.width, plan.height))]
    if not plan.options.skip_grid:
        saved.append(("the grid", grid_size(plan.count, plan.per_row, plan.width, plan.height)))
    for what, (width, height) in saved:
        if width * height < WATERMARK_MIN_PIXELS:
            raise UsageError(
                f"{what} of {width}x{height} is too small for the watermark, which needs {WATERMARK_MIN_PIXELS} pixels "
                "(256x256): give larger --H and --W"
            )


def load_engine(plan: Txt2ImgPlan) -> Engine:
    """The plan's model on a GPU if there is one, in batches of n_samples, with the original's pixels."""
    import torch

    from latentmill.engine import Engine

    on_gpu = torch.cuda.is_available()
    return Engine.load(
        plan.spec,
        device="cuda" if on_gpu else "cpu",
        dtype="float16" if on_gpu and plan.options.precision == "autocast" else "float32",
        batch_size=plan.options.n_samples,
        cut_pixels=True,
    )


def generate_batches(plan: Txt2ImgPlan, engine: Engine) -> Iterator[list[GenerationResult]]:
    """One list of results per batch, in the original's order."""
    options = plan.options
    legacy = _LegacyNoise(plan, engine) if options.rng == "legacy" else None
    ordinal = 0
    for _ in range(options.n_iter):
        for prompts in plan.batches:
            first = 0 if options.fixed_code else ordinal
            requests = [_request(plan, prompt, 0 if legacy else first + slot) for slot, prompt in enumerate(prompts)]
            yield engine.generate(requests, noise=legacy.next_batch(len(prompts)) if legacy else None)
            ordinal += len(prompts)


def _request(plan: Txt2ImgPlan, prompt: str, ordinal: int) -> GenerationRequest:
    options = plan.options
    return _Request(
        prompt=prompt,
        seed=options.seed + ordinal,
        width=plan.width,
        height=plan.height,
        num_inference_steps=options.ddim_steps,
        guidance_scale=options.scale,
        sampler=options.sampler,
        eta=options.eta,
    )


class _LegacyNoise:
    """The original's draws from one stream: the fixed code if any, then for each batch its start, if none is fixed, and
    what its sampler draws, used or not: DDIM once a step even at eta 0, PLMS likewise and once more, the solver never.
    """

    def __init__(self, plan: Txt2ImgPlan, engine: Engine) -> None:
        from latentmill.engine import NoiseStream

        self._stream: NoiseStream = NoiseStream(plan.options.seed, plan.latent_shape, engine.device)
        self._code = self._stream.take(1, 1) if plan.options.fixed_code else None
        self._drawn = {"ddim": plan.timesteps, "plms": plan.timesteps + 1, "dpmpp_2m": 0}[plan.options.sampler]
        self._used = plan.timesteps if plan.options.eta > 0 else 0

    def next_batch(self, rows: int) -> list[Tensor]:
        """Each row's draws that count; the stream moves on as far as the original's."""
        import torch

        start = self._stream.take(1, 1) if self._code is None else self._code
        rest = self._stream.take(self._used, self._drawn)
        return list(torch.cat([start, rest], dim=1)[:rows])


def run_txt2img(
    plan: Txt2ImgPlan, engine: Engine, *, on_batch: Callable[[int], None] = lambda _: None
) -> Txt2ImgSummary:
    """Each picture is saved as soon as its batch is done, the grid at the end. `on_batch` is told how many are done."""
    options = plan.options
    folder = OutputFolder(Path(options.outdir))
    limit = plan.model.layout.blueprint.max_tokens - 2
    pictures: list[Pixels] = []
    saved: list[Path] = []
    results: list[GenerationResult] = []
    for batch in generate_batches(plan, engine):
        safe = [picture_to_save(result, plan) for result in batch]
        if not options.skip_save:
            saved += [folder.save_sample(watermarked(picture)) for picture in safe]
        if not options.skip_grid:
            pictures += safe
        results += [replace(result, pixels=None) for result in batch]
        on_batch(len(results))
    return Txt2ImgSummary(
        samples=tuple(saved),
        grid=None if options.skip_grid else folder.save_grid(watermarked(draw_grid(pictures, plan.per_row))),
        flagged=sum(result.safety is not None and result.safety.flagged for result in results),
        failures=tuple(result.error for result in results if result.error is not None),
        cut_prompts=sum(result.prompt_tokens > limit for result in results),
    )


def picture_to_save(result: GenerationResult, plan: Txt2ImgPlan) -> Pixels:
    """The picture if a checker has passed it, else a black one."""
    if result.status == "ok" and result.pixels is not None:
        return result.pixels
    return np.zeros((plan.height, plan.width, 3), np.uint8)


def watermarked(pixels: Pixels) -> Pixels:
    """The pixels with the original's watermark."""
    from latentmill.engine import embed_watermark  # it imports OpenCV

    return embed_watermark(pixels, WATERMARK, WATERMARK_METHOD)
