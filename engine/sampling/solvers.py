"""The solvers: pure functions from noise to latents, which ask for predictions at the levels that they visit.

A solver is a generator: it yields latents with their level, and is sent what the model predicts from them; so it never
knows which other rows are denoised beside its own. Guidance and what the model was trained to predict are the
denoiser's business; a solver sees noise and x0. All take `(noise (n, c, h, w) float32, levels, draw_noise)` and keep
the noise's dtype. Where a solver can do both, it solves the reverse diffusion (SDE) with `draw_noise`, and its
probability-flow ODE with None.

Yielded latents are `signal * x0 + noise * (standard-normal noise)`. Solvers in sigma step where x0 keeps its scale
instead, x = x0 + sigma * noise, which is those latents divided by signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from latentmill.engine.sampling.denoiser import Denoise, Prediction
from latentmill.engine.sampling.levels import Levels, Step
from latentmill.engine.sampling.noise_level import NoiseLevel

DrawNoise = Callable[[], Tensor]
"""Fresh standard-normal noise `(n, c, h, w) float32`, each row from its own sample's generator."""

Solver = Generator[tuple[Tensor, NoiseLevel], Prediction, Tensor]
"""A solver under way: yields latents and their level, takes what the model predicts, returns the final latents."""

_FEW_STEPS = 15
"""Below this many steps DPM-Solver's last one is of first order, for stability, as in its authors' code."""

_SIGMA_DATA = 0.5
"""Standard deviation of the data that latent consistency models assume."""


def solve(solver: Solver, denoise: Denoise) -> Tensor:
    """The solver's latents, by a model that sees nothing but its rows."""
    asked = next(solver)
    while True:
        try:
            asked = solver.send(denoise(*asked))
        except StopIteration as end:
            latents: Tensor = end.value
            return latents


def ddim(noise: Tensor, levels: Levels, draw_noise: DrawNoise | None = None, *, eta: Tensor | None = None) -> Solver:
    """Denoising diffusion implicit models, with noise of strength eta per row (arXiv:2010.02502, eq. 12 and 16).

    `eta` is `(n, 1, 1, 1) float32`, 0 by default. For any model. With eta 1 it is the ancestral sampler of DDPM. First
    order.
    """
    latents = noise
    if eta is None:
        eta = torch.zeros(len(noise), 1, 1, 1, device=noise.device)
    for here, following in levels.steps:
        prediction = yield latents, here
        sigma = eta * (following.noise / here.noise * math.sqrt(1 - (here.signal / following.signal) ** 2))
        direction = (following.noise**2 - sigma**2).clamp(min=0).sqrt()
        latents = following.signal * prediction.x0 + direction * prediction.noise
        if draw_noise is not None:
            # A row without noise keeps its very bits, whatever its neighbours ask for.
            latents = torch.where(eta > 0, latents + sigma * draw_noise(), latents)
    return latents


def plms(noise: Tensor, levels: Levels, _draw_noise: DrawNoise | None = None) -> Solver:
    """Pseudo linear multistep (arXiv:2202.09778, eq. 12), started by one pseudo improved Euler step as in LDM's code.

    For any model. Runs the model once more than there are steps. The history is of predicted noise whatever the model
    predicts, as the paper has it: second order. (diffusers combines velocities, which is of first order only, and
    refuses models that predict x0.)
    """
    latents = noise
    history: list[Tensor] = []
    for step in levels.steps:
        prediction = yield latents, step.here
        current = combined = prediction.noise
        move = step
        if not history and levels.correction is not None:
            end, move = levels.correction
            ahead = yield _transfer(latents, current, step), end
            combined = (current + ahead.noise) / 2
        elif len(history) == 1:
            combined = (3 * current - history[-1]) / 2
        elif len(history) == 2:
            combined = (23 * current - 16 * history[-1] + 5 * history[-2]) / 12
        elif len(history) == 3:
            combined = (55 * current - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history = [*history[-2:], current]
        if move.here.signal > 0:
            latents = _transfer(latents, combined, move)
        else:
            # Where there is no signal at all, the noise says nothing of x0: start with DDIM's step.
            latents = move.next.signal * prediction.x0 + move.next.noise * current
    return latents


def _transfer(latents: Tensor, noise: Tensor, step: Step) -> Tensor:
    """Move latents along given noise over one step (arXiv:2202.09778, eq. 11)."""
    x0 = (latents - step.here.noise * noise) / step.here.signal
    return step.next.signal * x0 + step.next.noise * noise


def euler(noise: Tensor, levels: Levels, draw_noise: DrawNoise | None = None) -> Solver:
    """Euler's method in sigma (arXiv:2206.00364, algorithm 1 without its second half). First order.

    With `draw_noise` ancestral sampling, whose noise is that of DDIM's eta 1. For any model; with trailing timesteps
    and 1 to 4 steps for those distilled adversarially.
    """
    x = _start(noise, levels)
    for step in levels.steps:
        prediction = yield x * step.here.signal, step.here
        x = _towards(prediction.x0, x, step, draw_noise)
    return x


def flow_euler(noise: Tensor, levels: Levels, _draw_noise: DrawNoise | None = None) -> Solver:
    """Euler's method along the flow from noise to data (arXiv:2403.03206, eq. 1 and 13). First order.

    For models of flow matching, whose first level is noise alone: there is no x0 + sigma * noise to step in.
    """
    latents = noise
    for here, following in levels.steps:
        prediction = yield latents, here
        latents = latents + (following.noise - here.noise) * (prediction.noise - prediction.x0)
    return latents


def heun(noise: Tensor, levels: Levels, _draw_noise: DrawNoise | None = None) -> Solver:
    """Heun's method in sigma (arXiv:2206.00364, algorithm 1). Second order.

    For any model. Runs the model twice a step, but once in the last.
    """
    x = _start(noise, levels)
    for here, following in levels.steps:
        prediction = yield x * here.signal, here
        slope = (x - prediction.x0) / here.sigma
        length = following.sigma - here.sigma
        if following.sigma > 0:
            ahead = x + length * slope
            prediction = yield ahead * following.signal, following
            slope = (slope + (ahead - prediction.x0) / following.sigma) / 2
        x = x + length * slope
    return x


def dpmpp_2m(noise: Tensor, levels: Levels, draw_noise: DrawNoise | None = None) -> Solver:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), with `draw_noise` its SDE (section 5). Second order.

    For any model, at one run of it a step. Written in sigma: lambda of the paper is -log sigma.
    """
    x = _start(noise, levels)
    earlier: tuple[Tensor, float] | None = None
    for number, step in enumerate(levels.steps, start=1):
        prediction = yield x * step.here.signal, step.here
        x0 = target = prediction.x0
        if step.next.sigma > 0:
            length = -math.log(step.next.sigma / step.here.sigma)
            if earlier is not None and not (number == len(levels.steps) < _FEW_STEPS):
                earlier_x0, earlier_length = earlier
                target = x0 + length / (2 * earlier_length) * (x0 - earlier_x0)
            earlier = (x0, length)
        x = _towards(target, x, step, draw_noise)
    return x * levels.steps[-1].next.signal


def lcm(noise: Tensor, levels: Levels, draw_noise: DrawNoise) -> Solver:
    """Multistep latent consistency sampling (arXiv:2310.04378, algorithm 3; scalings: arXiv:2303.01469, appendix C).

    Only for models distilled for it (LCM, or with LCM-LoRA merged), at 1 to 8 steps and little or no guidance: every
    step goes the whole way to x0, and noise is put back. Of any other model the pictures are blurred.
    """
    latents = noise
    for here, following in levels.steps:
        scaled = here.timestep * levels.timestep_scaling
        radius = math.hypot(scaled, _SIGMA_DATA)
        # The consistency function: x0, but the latents themselves as the timestep goes to 0.
        prediction = yield latents, here
        latents = scaled / radius * prediction.x0 + (_SIGMA_DATA / radius) ** 2 * latents
        if following.noise > 0:
            latents = following.signal * latents + following.noise * draw_noise()
    return latents


def _start(noise: Tensor, levels: Levels) -> Tensor:
    """Initial noise as x, in sigma."""
    first = levels.steps[0].here
    return noise * first.sigma if levels.starts_as_noise else noise / first.signal


def _towards(x0: Tensor, x: Tensor, step: Step, draw_noise: DrawNoise | None) -> Tensor:
    """Keep of x's distance to x0 what the next sigma leaves; of the SDE's, part is fresh noise."""
    ratio = step.next.sigma / step.here.sigma
    if draw_noise is None:
        return x0 + ratio * (x - x0)
    x = x0 + ratio**2 * (x - x0)
    return x + step.next.sigma * math.sqrt(1 - ratio**2) * draw_noise() if step.next.sigma > 0 else x
