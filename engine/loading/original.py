"""A checkpoint as the original command builds it: by its config, except where the file itself says otherwise.

Facts of CompVis's `ldm` (`LatentDiffusion.register_schedule`, `make_beta_schedule`): the schedule is a buffer of the
model, so a file that holds `alphas_cumprod` brings its own, rounded as it was saved.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.checkpoint import WeightsFile
from latentmill.engine.types import EngineError, OriginalModelSpec

_BUFFER = "alphas_cumprod"
_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
_MOST_TIMESTEPS = 100_000


def as_configured(blueprint: Blueprint, file: WeightsFile, spec: OriginalModelSpec) -> Blueprint:
    """The blueprint with the config's scale of latents, and its schedule or the file's own.

    Raises EngineError for a schedule that cannot be sampled with, and for an average that the file does not hold.
    """
    _check(spec)
    if spec.use_ema and not any(key.startswith("model_ema.diffusion_model") for key in file.shapes):
        raise EngineError(
            f"{file.path} holds no running average of its weights (model_ema.*), but use_ema is true, as it is where "
            "the config does not say; give use_ema: false to sample with the weights themselves"
        )
    if _BUFFER in file.shapes and file.shapes[_BUFFER] != (spec.timesteps,):
        raise EngineError(
            f"{file.path} has {_BUFFER} of shape {file.shapes[_BUFFER]}, but timesteps is {spec.timesteps}; give the "
            "config that belongs to the checkpoint"
        )
    alphas = file.read(_BUFFER).double().numpy() if _BUFFER in file.shapes else _configured_alphas(spec)
    where = file.path if _BUFFER in file.shapes else f"the schedule {spec.beta_schedule!r}"
    scheduler = dataclasses.replace(
        blueprint.scheduler,
        num_train_timesteps=spec.timesteps,
        trained_betas=tuple(_betas_of(alphas, where).tolist()),
        rescale_betas_zero_snr=False,
    )
    vae = dataclasses.replace(blueprint.vae, scaling_factor=spec.scale_factor)
    return dataclasses.replace(blueprint, scheduler=scheduler, autoencoder=vae)


def _check(spec: OriginalModelSpec) -> None:
    """Raises EngineError for a number out of range."""
    if not 3 <= spec.timesteps <= _MOST_TIMESTEPS:
        raise EngineError(f"timesteps is {spec.timesteps}; it must be 3 to {_MOST_TIMESTEPS}")
    for name in ("linear_start", "linear_end", "cosine_s"):
        value = getattr(spec, name)
        if not 0 <= value < 1:
            raise EngineError(f"{name} is {value}; it must be 0 or more and below 1")
    if spec.scale_factor == 0 or not math.isfinite(spec.scale_factor):
        raise EngineError(f"scale_factor is {spec.scale_factor}; it must be a number other than 0")


def _configured_alphas(spec: OriginalModelSpec) -> NDArray[np.float64]:
    """`(T,)` cumulative alphas of the original's schedules: its `linear` is linear in the square root."""
    start, end, total = spec.linear_start, spec.linear_end, spec.timesteps
    if spec.beta_schedule == "linear":
        betas = np.linspace(start**0.5, end**0.5, total) ** 2
    elif spec.beta_schedule == "sqrt_linear":
        betas = np.linspace(start, end, total)
    elif spec.beta_schedule == "sqrt":
        betas = np.linspace(start, end, total) ** 0.5
    elif spec.beta_schedule == "cosine":
        # arXiv:2102.09672, eq. 17.
        signal = np.cos((np.arange(total + 1) / total + spec.cosine_s) / (1 + spec.cosine_s) * np.pi / 2) ** 2
        betas = np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)
    else:
        raise EngineError(f"beta_schedule is {spec.beta_schedule!r}; it must be {', '.join(_SCHEDULES)}")
    # The buffer is float32; it is computed in float64.
    return np.cumprod(1 - betas).astype(np.float32).astype(np.float64)


def _betas_of(alphas: NDArray[np.float64], where: object) -> NDArray[np.float64]:
    """`(T,)` betas with these cumulative alphas. Raises EngineError unless they fall from 1 towards 0."""
    before = np.concatenate([[1.0], alphas[:-1]])
    # No step samples at timestep 0, so it may have no noise; models of zero terminal SNR have no signal at the last.
    fades = len(alphas) > 2 and alphas[1] < 1 and alphas[-2] > 0 and alphas[-1] >= 0 and bool((alphas <= before).all())
    if not fades:
        raise EngineError(
            f"{_BUFFER} of {where} does not fall from 1 towards 0, timestep by timestep; it cannot be sampled with"
        )
    return np.asarray(1 - alphas / before)
