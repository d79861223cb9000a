"""The original command's options: its names, defaults and parser, so that its users' commands work as they are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from latentmill.engine import SEED_LIMIT
from latentmill.jobs.errors import UsageError

DEFAULT_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
DEFAULT_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
LAION_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
LAION_CKPT = "models/ldm/text2img-large/model.ckpt"
LAION_OUTDIR = "outputs/txt2img-samples-laion400m"

_ABOUT = """\
Draw pictures for a prompt, as the original scripts/txt2img.py of Stable Diffusion does: the same options, files and
numbers. Without --config and --ckpt, the original's models/ldm/stable-diffusion-v1/model.ckpt draws if it is there, and
else the small model that ships with latentmill."""

_DIFFERENCES = """\
where this differs from the original, on purpose:
  - A flagged picture is replaced by a black one, numbered, watermarked and saved; so is one that the checker fails on,
    and then the exit code is 1. The original handed the flagged picture out when its replacement was missing.
  - A last batch of --from-file with fewer prompts than --n_samples works; the original crashed.
  - A number that is taken is passed over; the original overwrote the file after one before it had been deleted.
  - Numbers of steps at which the original crashed, and pictures too small for the watermark, are refused at the start.
  - A key of --config that changes the picture is honoured, or refused by name; what the config says of the checkpoint
    is held against it. The original passed over what did not fit, and drew with random weights in its place.
  - parameterization: x0 is sampled as what it is; the original took it for noise, and so did its later version with v
    by --plms.
  - --ddim_eta above 1 is clamped where more noise is asked for than a step has; the original's pictures were NaN there.
  - A float16 checkpoint of a model with v is sampled by its alphas_cumprod alone; that later version used the rounded
    square roots beside it as well.
  - autocast means float16 weights on a GPU, and float32 on a CPU, where the original could not use it.
  - The checker is the one beside the checkpoint (a folder safety_checker/), else open-nsfw.
  - Seeds: legacy noise is that of torch's generator, freshly seeded, of the device that draws. On a CPU the original
    had already used up some of it by building its network, how much depended on the versions of its libraries.

example:
  latentmill txt2img --prompt "a large red circle in the center on a white background" --plms

exit codes: 0 done; 1 a picture could not be made or checked; 2 the options are at fault, nothing was written;
130 interrupted, what was saved stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Txt2ImgOptions:
    """What was asked for, by the original's names. None is for what the model decides."""

    prompt: str
    from_file: str | None
    outdir: str
    skip_grid: bool
    skip_save: bool
    n_iter: int
    n_samples: int
    n_rows: int
    ddim_steps: int
    plms: bool
    dpm_solver: bool
    ddim_eta: float
    scale: float
    fixed_code: bool
    seed: int
    H: int | None
    W: int | None
    C: int | None
    f: int | None
    laion400m: bool
    config: str | None
    ckpt: str | None
    precision: Literal["full", "autocast"]
    rng: Literal["legacy", "per-sample"]

    @property
    def sampler(self) -> str:
        """The engine's name of the sampler; the solver wins, as in the original."""
        if self.dpm_solver:
            return "dpmpp_2m"
        return "plms" if self.plms else "ddim"

    @property
    def eta(self) -> float:
        """The eta that the sampler takes: the original's solver ignores it."""
        return 0.0 if self.dpm_solver else self.ddim_eta


def parse_options(arguments: Sequence[str], program: str = "latentmill txt2img") -> Txt2ImgOptions:
    """Parse the command line as the original did. Raises UsageError; `--help` prints and raises SystemExit."""
    found = vars(build_parser(program).parse_args(arguments))
    for name in ("prompt", "outdir"):
        if found[name] is None:
            raise UsageError(f"--{name} has no value; give one, or leave it out")
    if found["laion400m"]:
        found |= {"config": LAION_CONFIG, "ckpt": LAION_CKPT, "outdir": LAION_OUTDIR}
    options = Txt2ImgOptions(**found)
    _check(options)
    return options


def _check(options: Txt2ImgOptions) -> None:
    for name in ("n_iter", "n_samples", "H", "W", "C", "f"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be 1 or more")
    if not 0 <= options.seed < SEED_LIMIT:
        raise UsageError(f"--seed is {options.seed}; it must be 0 to {SEED_LIMIT - 1}")
    if not math.isfinite(options.scale):
        raise UsageError(f"--scale is {options.scale}; it must be a number")
    if not (math.isfinite(options.ddim_eta) and options.ddim_eta >= 0):
        raise UsageError(f"--ddim_eta is {options.ddim_eta}; it must be 0 or more")
    if options.sampler == "plms" and options.ddim_eta != 0:
        raise UsageError(f"ddim_eta must be 0 for PLMS, and is {options.ddim_eta}: leave out --ddim_eta or --plms")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser. Like the original's it takes any beginning of an option's name that fits no other."""
    parser = _Parser(
        prog=program,
        description=_ABOUT,
        epilog=_DIFFERENCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--prompt TEXT | --from-file FILE] [OPTION ...]",
    )
    _add_what(parser.add_argument_group("what to draw"))
    _add_how(parser.add_argument_group("how to draw it"))
    _add_files(parser.add_argument_group("files"))
    _add_model(parser.add_argument_group("model"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        nargs="?",
        metavar="TEXT",
        default="a painting of a virus monster playing guitar",
        help="the prompt (default: %(default)s)",
    )
    group.add_argument(
        "--from-file",
        metavar="FILE",
        help="one prompt a line instead, n_samples different ones a batch; an empty line is an empty prompt",
    )
    group.add_argument("--n_samples", type=int, default=3, metavar="N", help="pictures per batch (default: 3)")
    group.add_argument("--n_iter", type=int, default=2, metavar="N", help="do everything this often (default: 2)")
    _whole(
        group,
        "--H",
        "height in pixels, cut to whole latent cells (default: 512 with a checkpoint, else the model's own)",
    )
    _whole(group, "--W", "width in pixels (default: as for --H)")


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ddim_steps", type=int, default=50, metavar="S", help="sampling steps (default: 50)")
    group.add_argument("--plms", action="store_true", help="sample with PLMS instead of DDIM")
    group.add_argument(
        "--dpm_solver", action="store_true", help="sample with DPM-Solver++; it wins over --plms and knows no eta"
    )
    group.add_argument(
        "--ddim_eta", type=float, default=0.0, metavar="ETA", help="noise added by DDIM, 0 to 1 (default: 0)"
    )
    group.add_argument(
        "--scale",
        type=float,
        default=7.5,
        metavar="SCALE",
        help="guidance: empty + scale * (prompt - empty), of the predicted noise; 1 is without (default: 7.5)",
    )
    group.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")
    group.add_argument("--seed", type=int, default=42, metavar="SEED", help="of all noise (default: 42)")
    group.add_argument(
        "--rng",
        choices=["legacy", "per-sample"],
        default="legacy",
        help="legacy: one stream of noise, drawn from in the original's order; per-sample: sample k has the seed "
        "SEED + k, as in `latentmill run` (with --fixed_code every batch starts at SEED) (default: legacy)",
    )
    group.add_argument(
        "--precision",
        choices=["full", "autocast"],
        default="autocast",
        help="full: float32; autocast: float16 on a GPU (default: autocast)",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--outdir",
        nargs="?",
        metavar="DIR",
        default="outputs/txt2img-samples",
        help="pictures go to DIR/samples/00000.png and on, the grid of all to DIR/grid-0000.png (default: %(default)s)",
    )
    group.add_argument("--skip_grid", action="store_true", help="save no grid")
    group.add_argument("--skip_save", action="store_true", help="save no single pictures")
    group.add_argument(
        "--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)"
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ckpt", metavar="FILE", help=f"checkpoint (default: {DEFAULT_CKPT} if it is there)")
    group.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML that says what the checkpoint is, as CompVis's do; with --ckpt alone: {DEFAULT_CONFIG}",
    )
    group.add_argument(
        "--laion400m",
        action="store_true",
        help=f"the LAION-400M model: --config {LAION_CONFIG} --ckpt {LAION_CKPT} --outdir {LAION_OUTDIR}, "
        "whatever else is given for them",
    )
    _whole(group, "--C", "latent channels (default: 4 with a checkpoint, else the model's own); must be the model's")
    _whole(group, "--f", "pixels per latent cell (default: 8 with a checkpoint, else the model's own); likewise")


def _whole(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(name, type=int, metavar="N", help=text)
