"""The measured rows of docs/models.md: `python -m tests.engine.measured [--write]`, a minute or two on one core.

Every family with random weights at small widths, and the embedded model with its real ones, drawn by the engine and by
diffusers from the same noise in fp32. Told are the worst difference of the latents that are decoded, after all steps,
relative to the largest of them, and of the pictures, in grey levels of 255.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, VQModel

from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec
from tests.engine import test_joint_transformers as joint
from tests.engine.families import PROMPTS, reference_pictures, requests, write_ldm, write_sd1, write_sd2, write_sdxl

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
STEPS = 10
_PART = re.compile(r"(<!-- measured: families -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_HEAD = ("model", "weights", "steps", "latents, relative", "values that differ", "at most by")

Pictures = np.ndarray
Reference = Callable[[Path, list[GenerationRequest]], Pictures]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, how diffusers draws it, and what is asked of both."""

    name: str
    write: Callable[[Path], Path]
    rows: Sequence[GenerationRequest]
    reference: Reference
    weights: str = "random"
    spacing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far two sets of pictures, and the latents that they were decoded from, are apart at most."""

    latents: float
    differing: float
    levels: int


def plain(folder: Path, rows: list[GenerationRequest]) -> Pictures:
    """The folder's own pipeline, called as its documentation says."""
    return reference_pictures(loaded(folder), rows)


def turbo(folder: Path, rows: list[GenerationRequest]) -> Pictures:
    """The same by the distilled models' sampler."""
    pipeline = loaded(folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return reference_pictures(pipeline, rows)


def embedded(folder: Path, rows: list[GenerationRequest]) -> Pictures:
    """The same in the engine's memory layout: the reference differs from itself in another one by as much."""
    pipeline = loaded(folder)
    pipeline.unet.to(memory_format=torch.channels_last)
    return reference_pictures(pipeline, rows)


def loaded(folder: Path) -> DiffusionPipeline:
    """The pipeline that the folder names, in fp32."""
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def scenes() -> list[GenerationRequest]:
    """What the embedded model can draw, at its own size."""
    texts = ["a large red circle in the center on a white background", "a flat icon of a panda", *PROMPTS[2:]]
    rows = requests(256, guidance_scale=4.0, steps=20)
    return [replace(row, prompt=text, width=256) for row, text in zip(rows, texts, strict=True)]


def cases() -> list[Case]:
    """Every row of the table."""
    guided, few = requests(32, steps=STEPS), {"guidance_scale": 0.0, "sampler": "euler"}
    found = [
        Case(name="Stable Diffusion 1.x", write=write_sd1, rows=guided, reference=plain),
        Case(name="Stable Diffusion 2.x", write=write_sd2, rows=guided, reference=plain),
        Case(name="SDXL", write=write_sdxl, rows=guided, reference=plain),
    ]
    for steps in (1, 4):
        rows = requests(32, steps=steps, **few)
        two: dict[str, Callable[[Path], Path]] = {
            "SD-Turbo": lambda folder: write_sd2(folder, "epsilon"),
            "SDXL-Turbo": write_sdxl,
        }
        found += [
            Case(name=name, write=write, rows=rows, reference=turbo, spacing="trailing") for name, write in two.items()
        ]
    names = {
        "sd3": "Stable Diffusion 3",
        "sd3 without T5": "Stable Diffusion 3 without T5",
        "sd35-large": "Stable Diffusion 3.5 large",
        "sd35-medium": "Stable Diffusion 3.5 medium",
        "flux-dev": "Flux.1 dev",
        "flux-schnell": "Flux.1 schnell",
    }
    for key, name in names.items():
        rows = joint.rows_for(key, steps=STEPS)
        found.append(Case(name=name, write=joint.WRITERS[key], rows=rows, reference=joint.reference))
    for kind, name, side in (("kl", "KL", 64), ("vq", "VQ of f=4", 32), ("vq-f8", "VQ of f=8", 64)):
        write = _ldm(kind)
        rows = requests(side, steps=STEPS)
        found.append(Case(name=f"LDM text2img, {name}", write=write, rows=rows, reference=plain))
    shipped = Case(name="the embedded model", write=lambda _: EMBEDDED_MODEL, rows=scenes(), reference=embedded)
    return [*found, replace(shipped, weights="its own")]


def _ldm(kind: str) -> Callable[[Path], Path]:
    return lambda folder: write_ldm(folder, kind)


def measure(case: Case, folder: Path) -> Measured:
    """Draw a case with both, in `folder` if it has to be written first."""
    place, rows = case.write(folder), list(case.rows)
    spec = ModelSpec(model=str(place), safety="none", timestep_spacing=case.spacing)
    engine = Engine.load(spec, device="cpu", dtype="float32", batch_size=len(rows))
    ours: list[torch.Tensor] = []
    with noted(engine._models.autoencoder, ours):
        found = np.stack([result.pixels for result in engine.generate(rows)])
    theirs: list[torch.Tensor] = []
    with noted(AutoencoderKL, theirs), noted(VQModel, theirs):
        expected = case.reference(place, rows)
    if expected.std() <= 5 or len({picture.tobytes() for picture in expected}) < len(expected):
        raise RuntimeError(f"{case.name}: flat or equal pictures prove nothing")
    latents, reference = torch.cat(ours), torch.cat(theirs)
    apart = np.abs(found.astype(int) - expected.astype(int))
    return Measured(
        latents=float((latents - reference).abs().max() / reference.abs().max()),
        differing=float((apart > 0).mean()),
        levels=int(apart.max()),
    )


@contextlib.contextmanager
def noted(decoder: Any, latents: list[torch.Tensor]) -> Iterator[None]:
    """Meanwhile what an autoencoder, or any of a class, is given to decode is kept."""
    decode, own = decoder.decode, "decode" in vars(decoder)
    at = 1 if isinstance(decoder, type) else 0

    def watched(*given: Any, **more: Any) -> Any:
        latents.append(given[at].detach().clone())
        return decode(*given, **more)

    decoder.decode = watched
    try:
        yield
    finally:
        if own:
            decoder.decode = decode
        else:
            del decoder.decode


def row(case: Case, measured: Measured) -> str:
    """One line of the table."""
    differing = f"{measured.differing:.3%}" if measured.levels else "none"
    levels = f"{measured.levels}/255" if measured.levels else "equal"
    latents = f"{measured.latents:.1e}" if measured.latents else "equal"
    cells = (case.name, case.weights, str(case.rows[0].num_inference_steps), latents, differing, levels)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.measured", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # diffusers speaks of its own
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    lines = [f"| {' | '.join(_HEAD)} |", f"| {' | '.join(['---'] * len(_HEAD))} |"]
    with tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(cases()):
            # The reference reads from the folder's name what is left out of it.
            folder = Path(root) / str(number) / ("without" if "without" in case.name else case.name.split()[-1])
            lines.append(row(case, measure(case, folder)))
            print(lines[-1], flush=True)
    if arguments.write:
        table = "\n".join(lines) + "\n"
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_PART.sub(lambda found: found[1] + table + found[3], page), encoding="utf-8")


if __name__ == "__main__":
    main()
