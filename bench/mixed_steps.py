"""What rows of several loops gain by sharing a batch, on a CPU: `python -m bench.mixed_steps`.

CPU seconds of one thread, pictures of 128 px by the embedded model at batch 8, rows of each loop apart (each in padded
batches of its own) and all rows together, in turn; the same bits are asserted. Runs of the U-Net have no noise.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.parts import unet_of
from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec

BATCH, ROUNDS = 8, 3
ROW = GenerationRequest(prompt="", width=128, height=128, guidance_scale=4.0)
PROMPTS = ("a large red circle in the center on a white background", "a flat icon of a house", "a blue square")


@dataclass
class Measured:
    """Rows drawn in one way: their pictures, runs of the U-Net, CPU seconds of each round."""

    pictures: list[bytes]
    passes: int
    seconds: list[float]


def rows_of(steps: Sequence[int], prompts: int, samplers: Sequence[str] = ("ddim",)) -> list[GenerationRequest]:
    """So many prompts with each number of steps and each sampler."""
    return [
        replace(ROW, prompt=PROMPTS[n % len(PROMPTS)], seed=n, num_inference_steps=count, sampler=sampler)
        for count in steps
        for sampler in samplers
        for n in range(prompts)
    ]


def skewed(rows: int) -> list[GenerationRequest]:
    """Each row with a number of steps of its own, most of them small."""
    chooser = random.Random(0)
    return [replace(row, num_inference_steps=10 + int(40 * chooser.random() ** 2)) for row in rows_of([10], rows)]


CASES: dict[str, list[GenerationRequest]] = {
    "3 prompts at 10, 15, ... 50 steps": rows_of(range(10, 51, 5), 3),
    "3 prompts at 10, 30, 50 steps by 3 samplers": rows_of([10, 30, 50], 3, ["ddim", "dpmpp_2m", "euler_a"]),
    "32 rows of 10 to 50 steps, each its own": skewed(32),
    "8 prompts at 10 and 50 steps": rows_of([10, 50], 8),
    "24 rows of 20 steps": rows_of([20], 24),
}


def apart(engine: Engine, rows: Sequence[GenerationRequest]) -> list[bytes]:
    """Rows of one loop at a time."""
    pictures: dict[int, bytes] = {}
    for loop in {row.loop for row in rows}:
        places = [place for place, row in enumerate(rows) if row.loop == loop]
        pictures |= zip(places, together(engine, [rows[place] for place in places]), strict=True)
    return [pictures[place] for place in range(len(rows))]


def together(engine: Engine, rows: Sequence[GenerationRequest]) -> list[bytes]:
    """All rows at once."""
    return [result.pixels.tobytes() for result in engine.generate(rows) if result.pixels is not None]


Draw = Callable[[Engine, Sequence[GenerationRequest]], list[bytes]]


def measure(engine: Engine, unet: torch.nn.Module, rows: Sequence[GenerationRequest]) -> list[Measured]:
    """Rows apart and together, round by round."""
    ways: list[tuple[Draw, Measured]] = [(apart, Measured([], 0, [])), (together, Measured([], 0, []))]
    for _ in range(ROUNDS):
        for draw, measured in ways:
            runs: list[None] = []
            hook = unet.register_forward_hook(lambda *_, runs=runs: runs.append(None))
            started = time.process_time()
            measured.pictures = draw(engine, rows)
            measured.seconds.append(time.process_time() - started)
            measured.passes = len(runs)
            hook.remove()
    return [measured for _, measured in ways]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    spec = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
    engine = Engine.load(spec, device="cpu", dtype="float32", batch_size=BATCH)
    unet = unet_of(engine)
    engine.generate([replace(ROW, num_inference_steps=1)])
    print(f"{'rows':46} {'U-Net runs':>12} {'CPU seconds':>14}  gain by runs, by seconds (paired, least to most)")
    for name, rows in CASES.items():
        first, second = measure(engine, unet, rows)
        assert first.pictures == second.pictures, "bits differ"
        ratios = sorted(before / after for before, after in zip(first.seconds, second.seconds, strict=True))
        seconds = f"{statistics.median(first.seconds):.1f} {statistics.median(second.seconds):.1f}"
        print(
            f"{name:46} {first.passes:>5} {second.passes:>6} {seconds:>14}  {first.passes / second.passes:.2f}, "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
