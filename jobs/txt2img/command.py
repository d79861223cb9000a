"""The command `latentmill txt2img`: its messages before, during and after drawing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from latentmill.jobs.show.display import safe
from latentmill.jobs.terminal import print_line
from latentmill.jobs.txt2img.options import DEFAULT_CKPT, parse_options

if TYPE_CHECKING:
    from latentmill.engine import Engine
    from latentmill.jobs.txt2img.drawing import Txt2ImgPlan, Txt2ImgSummary

INTERRUPTED = 130


def run_command(arguments: Sequence[str]) -> int:
    """Parse, draw, say what was done; the exit code. Raises UsageError for options at fault."""
    options = parse_options(arguments)
    if options.laion400m:
        print_line("Falling back to LAION 400M model...")
    from latentmill.jobs.txt2img.drawing import load_engine, plan_txt2img, run_txt2img

    plan = plan_txt2img(options)
    print_line(_model(plan))
    try:
        engine = load_engine(plan)
        print_line(_where(plan, engine))
        with _progress(plan.count) as on_batch:
            summary = run_txt2img(plan, engine, on_batch=on_batch)
    except KeyboardInterrupt:
        print_line(f"error: interrupted; what was saved stays in {safe(options.outdir)}", error=True)
        return INTERRUPTED
    _tell(plan, summary)
    return summary.exit_code


def _model(plan: Txt2ImgPlan) -> str:
    if not plan.embedded:
        return f"model: {safe(plan.model.path)} ({plan.model.family}), {plan.width}x{plan.height}"
    return (
        f"model: embedded, {plan.width}x{plan.height}: it draws one coloured shape on a plain background or the icon "
        f"of one thing, and cannot draw photographs, people, scenery or text; --ckpt FILE takes another model "
        f"(there is no {DEFAULT_CKPT} here)"
    )


def _where(plan: Txt2ImgPlan, engine: Engine) -> str:
    options = plan.options
    dtype = str(engine.dtype).removeprefix("torch.")
    remark = " (autocast has no effect on a CPU)" if engine.device.type == "cpu" and options.precision != "full" else ""
    spaced = "" if options.sampler == "dpmpp_2m" or plan.timesteps == options.ddim_steps else f" ({plan.timesteps} run)"
    return (
        f"sampling {plan.count} pictures in batches of {options.n_samples}: {options.sampler}, {options.ddim_steps} "
        f"steps{spaced}, scale {options.scale:g}, seed {options.seed}; {engine.device.type}, {dtype}{remark}"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar where standard error is a terminal, a line per batch elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done: print_line(f"latentmill: {done}/{total}", error=True)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda done: bar.update(task, completed=done)


def _tell(plan: Txt2ImgPlan, summary: Txt2ImgSummary) -> None:
    if summary.cut_prompts:
        limit = plan.model.layout.blueprint.max_tokens - 2
        print_line(
            f"{summary.cut_prompts} prompts were longer than the {limit} tokens that this model reads; cut there"
        )
    if summary.flagged:
        print_line(f"{summary.flagged} pictures were flagged as unsafe; black ones stand for them")
    for reason in sorted(set(summary.failures)):
        print_line(
            f"error: {summary.failures.count(reason)} pictures failed, and are black: {safe(reason)}", error=True
        )
    if summary.samples:
        first, last = summary.samples[0], summary.samples[-1]
        names = first.name if first == last else f"{first.name} to {last.name}"
        print_line(f"{len(summary.samples)} pictures in {safe(first.parent)}: {names}")
    if summary.grid is not None:
        print_line(f"grid of all: {safe(summary.grid)}")
