"""Answers about jobs as a person reads them: planned, run, submitted, where they stand; facts, and tables below."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.show.display import (
    duration,
    print_facts,
    print_summary,
    print_table,
    print_untrusted,
    safe,
    size,
)
from latentmill.jobs.terminal import print_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from latentmill.jobs.models.presets import ModelPreset
    from latentmill.jobs.outputs.making import Making
    from latentmill.jobs.outputs.status import StatusReport
    from latentmill.jobs.plans.summary import Estimate, PlanSummary
    from latentmill.jobs.reuse_preview import ReusePreview
    from latentmill.jobs.runner import RunSummary
    from latentmill.jobs.stages import Stage
    from latentmill.jobs.submission.api import JobInfo
    from latentmill.jobs.submission.submission import JobStatus, Submission

_VALUES_SHOWN = 8
_CELLS_SHOWN = 40
_COLUMNS_SHOWN = 20
_COLUMN_SHOWN = 60
_MESSAGE_LINES = 30
"""Characters shown of a failed job's message, from its end, where the error is; `logs` has all of it."""
_PROMPT_SHOWN = 100
_ERROR_SHOWN = 300
_UNREADABLE = {
    "record": "",
    "require": "; where it cannot be read back, the sample fails",
    "retry": "; where it cannot be read back, dwtDctSvd, and where that cannot, the sample fails",
}
_TEMPLATES = {
    "dynamic": "one prompt of each template, drawn by the sample's seed",
    "dynamic-all": "all prompts that the templates stand for",
}
_LONG_PROMPTS = {
    "truncate": "are cut there: --long-prompts chunk reads all of them",
    "chunk": "are read whole, in several chunks",
    "error": "are rejected: --long-prompts chunk reads all of them",
}


def show_plan(plan: PlanSummary, reuse: ReusePreview | None = None, *, quiet: bool = False) -> None:
    """What a run would do, and the first rows that it would leave out; with `quiet`, only the notes."""
    notes = plan.notes if reuse is None else (*plan.notes, *reuse.notes)
    for note in notes if quiet else ():
        print_line(f"note: {safe(note)}", error=True)
    if quiet:
        return
    facts = {**_input_facts(plan), **_work_facts(plan, reuse)}
    if plan.estimate is not None:
        facts |= _estimate_facts(plan.estimate)
    print_facts("plan", facts, style="cyan")
    if reuse is not None and reuse.axes:
        cells = [[cell.axis, cell.value, f"{cell.held:,} of {cell.samples:,}"] for cell in reuse.axes[:_CELLS_SHOWN]]
        title = f"held already (first {len(cells):,} of {len(reuse.axes):,} values)"
        print_table(title, ["axis", "value", "held"], cells)
    for note in notes:
        print_line(f"note: {safe(note)}")
    if plan.first_rejects:
        rows = [[note.source, note.source_row, note.reason, note.excerpt] for note in plan.first_rejects]
        print_table(
            f"rejected rows (first {len(rows)} of {plan.rejected_rows:,})", ["file", "row", "why", "text"], rows
        )
    print_line(
        safe(shlex.join(["next:", "latentmill", "run", *_flags_of_a_run(sys.argv[2:])]))
    )  # a name can be hostile


def _input_facts(plan: PlanSummary) -> dict[str, object]:
    """What goes in: rows, model, parameters and axes."""
    facts: dict[str, object] = {
        "manifest": ", ".join(plan.sources),
        "rows": f"{plan.rows:,} valid, {plan.rejected_rows:,} rejected",
        "model": _models(plan),
        **({"LoRAs": ", ".join(f"{name} {scale:g}" for name, scale in plan.loras.items())} if plan.loras else {}),
        "parameters": ", ".join(
            f"{name} {value}"
            for name, value in plan.parameters.items()
            if value != "" and name not in plan.axes and name not in plan.row_parameters
        ),
    }
    if plan.row_parameters:
        defaults = {name: plan.parameters[name] for name in plan.row_parameters}
        facts["from rows"] = ", ".join(
            f"{name} (where empty: {value}{' and on' if name == 'seed' else ''})" if value != "" else name
            for name, value in defaults.items()
        )
    if plan.carried_columns:
        facts["carried"] = ", ".join(safe(name, _COLUMN_SHOWN) for name in plan.carried_columns[:_COLUMNS_SHOWN]) + (
            f", ... ({len(plan.carried_columns):,} columns)" if len(plan.carried_columns) > _COLUMNS_SHOWN else ""
        )
    for name, values in plan.axes.items():
        more = f", ... ({len(values):,} values)" if len(values) > _VALUES_SHOWN else ""
        shown = (shorten(value) if "prompt" in name else value for value in values[:_VALUES_SHOWN])
        facts[f"sweep {name}"] = ", ".join(map(str, shown)) + more
    if plan.zips:
        facts["zip"] = "; ".join(" with ".join(names) for names in plan.zips)
    if plan.template != "none":
        facts["template"] = _TEMPLATES[plan.template]
    return facts


def _work_facts(plan: PlanSummary, reuse: ReusePreview | None) -> dict[str, object]:
    """What is done with it, and what comes out."""
    return {
        "samples": f"{plan.samples:,}",
        "chunks": f"{plan.chunks:,} of up to {plan.chunk_size} samples, in {len(plan.groups)} group(s) of one size, "
        f"sampler and number of steps",
        "denoising": f"{plan.passes:,} runs of {plan.batch_size} rows, {plan.padding_waste:.1%} padding",
        "prompts": "this model's limit of tokens is not known"
        if plan.token_limit is None
        else f"{plan.tokens_over_limit:,} of {plan.tokens_checked:,} have more than {plan.token_limit} tokens"
        + (f" and {_LONG_PROMPTS[plan.long_prompts]}" if plan.tokens_over_limit else "")
        + f"; syntax {plan.prompt_syntax}",
        "safety": f"{plan.safety}, flagged pictures: {plan.on_flagged}",
        "watermark": plan.watermark + _UNREADABLE[plan.watermark_policy],
        "size": f"about {size(plan.bytes_expected)}",
        "plan hash": plan.plan_hash[:16],
        **({} if reuse is None else _reuse_facts(reuse)),
        "output": f"{plan.out} (nothing was written)",
    }


def _models(plan: PlanSummary) -> str:
    where = f"{plan.dtype} on {plan.device}"
    if len(plan.models) < 2:
        return f"{plan.model} ({plan.model_family}, {where})"
    shown = ", ".join(f"{model.name} ({model.family}, {model.samples:,} samples)" for model in plan.models)
    return f"{shown}; {where}; each actor loads each of the {len(plan.models)} once at most, in this order"


def _estimate_facts(estimate: Estimate) -> dict[str, object]:
    several = f", {duration(estimate.elapsed)} by {estimate.models} at once" if estimate.models > 1 else ""
    facts: dict[str, object] = {"time": f"about {duration(estimate.seconds)} by one model{several} ({estimate.source})"}
    return facts if estimate.cost is None else {**facts, "cost": f"about {estimate.cost:,.2f}"}


def _flags_of_a_run(typed: Sequence[str]) -> list[str]:
    """What was typed, without the flags that only `plan` has."""
    kept: list[str] = []
    words = iter(typed)
    for word in words:
        if word == "--rate-from":
            next(words, None)
        elif word != "--measure" and not word.startswith("--rate-from="):
            kept.append(word)
    return kept


def _reuse_facts(reuse: ReusePreview) -> dict[str, object]:
    places = ", ".join(f"{held:,} of {out}" for out, held in reuse.held.items()) or "no output"
    among = "" if reuse.looked_at == reuse.samples else f" of the first {reuse.looked_at:,}"
    facts: dict[str, object] = {"reuse": f"{reuse.total:,}{among} samples need not be drawn: {places}"}
    if reuse.execution_classes:
        facts["if drawn on"] = "; ".join(reuse.execution_classes)
    return facts


def show_run(summary: RunSummary) -> None:
    """How the run ended, in a block to paste: what was made, how fast, where it is, and what to type next."""
    counts = summary.counts
    done = counts is not None
    facts: dict[str, object] = {
        "samples": f"{summary.samples:,}"
        + (f", {summary.rejected_rows:,} rows rejected" if summary.rejected_rows else ""),
    }
    if counts is not None:
        facts["result"] = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    facts["this run"] = (
        f"{summary.generated:,} images in {duration(summary.seconds)} ({summary.seconds:.1f} s), "
        f"{summary.images_per_second:.2f} images/s"
    )
    if summary.reused:
        facts["reused"] = f"{summary.reused:,} images of other outputs: see the rows' reused_from"
    facts |= _stage_facts(summary.stage_seconds)
    if summary.cost is not None:
        facts["cost"] = _cost(summary.cost, summary.gpu_seconds)
    facts["executor"] = summary.executor
    if summary.left_out:
        facts["left out"] = "; ".join(summary.left_out)
    if summary.execution_classes:
        facts["classes"] = "; ".join(summary.execution_classes)
    facts["images"] = f"{summary.out}/images"
    if done:
        facts |= _where_a_dataset_is(summary)
    elif summary.exit_code == 130:
        facts["resume"] = resume_command()
    else:
        facts["next"] = f"{summary.next_command}   the run that ends last publishes"
    unfinished = "interrupted" if summary.exit_code == 130 else f"shard {summary.shard} is done, others are not"
    title = "finished" if summary.exit_code == 0 else "finished with failed samples" if done else unfinished
    print_summary(title, facts, style="green" if summary.exit_code == 0 else "yellow")
    if summary.failures and counts is not None:
        rows = [
            [row.sample_id, row.row_id, safe(row.prompt, _PROMPT_SHOWN), safe(row.error, _ERROR_SHOWN)]
            for row in summary.failures
        ]
        title = f"failed samples (first {len(rows)} of {counts['failed']:,})"
        print_table(title, ["sample", "row", "prompt", "why"], rows)


def _where_a_dataset_is(summary: RunSummary) -> dict[str, object]:
    facts: dict[str, object] = {"dataset": f"{summary.out}/dataset"}
    if summary.failures:
        facts["failed only"] = retry_command()
    if len(summary.execution_classes) > 1:
        facts["bits"] = f"of {len(summary.execution_classes)} execution classes: see the rows' execution_class"
    if summary.latest is not None:
        facts["latest"] = f"{summary.latest.pointer}, at {summary.latest.date}"
    out = shlex.quote(summary.out)
    facts["next"] = f"latentmill verify {out}   or   {summary.next_command}"
    if not summary.generated and not summary.reused:
        facts["pictures"] = f"not read again by this run; if one is damaged: latentmill repair {out}"
    return facts


def _stage_facts(stage_seconds: Mapping[Stage, float]) -> dict[str, object]:
    """Seconds of all workers by stage."""
    if not stage_seconds:
        return {}
    shown = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in stage_seconds.items())
    return {"stages": f"{shown}; slowest: {next(iter(stage_seconds))}"}


def _cost(cost: float, gpu_seconds: float) -> str:
    return f"about {cost:,.2f} for {duration(gpu_seconds)} of GPU time"


def resume_command() -> str:
    """The command that resumes the run."""
    return shlex.join(["latentmill", *sys.argv[1:]])


def retry_command() -> str:
    """The command that makes only the failed samples again."""
    typed = sys.argv[1:]
    return shlex.join(["latentmill", *typed, *([] if "--retry-failed" in typed else ["--retry-failed"])])


def show_status(report: StatusReport, price: float | None = None) -> None:
    """The progress of a job, or how its dataset was made."""
    facts: dict[str, object] = {
        "state": report.state,
        "chunks": f"{report.chunks_committed:,} of {report.chunks:,} committed",
        "samples": f"{report.samples:,}",
        "rows": f"{report.rows:,} valid, {report.rejected_rows:,} rejected",
        "result": "unknown before publication; --deep counts"
        if report.counts is None
        else ", ".join(f"{count:,} {status}" for status, count in report.counts.items()),
        "plan hash": report.plan_hash[:16],
    }
    if report.repairs:
        facts["repairs"] = f"{report.repairs:,} repair records in the ledger"
    if report.making is None:
        print_facts(report.out, facts, style="green" if report.published else "yellow")
        return
    facts |= _making_facts(report.making, price)
    out = shlex.quote(report.out)
    facts["next"] = f"latentmill verify {out}   or   latentmill report {out}"
    print_summary(report.out, facts)


def _making_facts(making: Making, price: float | None) -> dict[str, object]:
    speed = "" if making.images_per_second is None else f", {making.images_per_second:.2f} images/s"
    pauses = f", without {making.pauses} pause{'' if making.pauses == 1 else 's'}" if making.pauses else ""
    facts: dict[str, object] = {"made in": f"{duration(making.seconds)} ({making.seconds:.1f} s){pauses}{speed}"}
    facts |= _stage_facts(making.stage_seconds)
    if price is not None and making.worker_seconds is not None:
        facts["cost"] = _cost(making.worker_seconds / 3600 * price, making.worker_seconds)
    if 0 < making.records_read < making.records and "stages" in facts:
        facts["stages"] = f"{facts['stages']} (by {making.records_read:,} of {making.records:,} chunks)"
    if making.execution_classes:
        facts["classes"] = "; ".join(making.execution_classes)
    return facts


def show_job_status(status: JobStatus, price: float | None = None) -> None:
    """The progress of a job in its output, and its state on its cluster."""
    if status.report is not None:
        show_status(status.report, price)
    if status.job is not None:
        _show_job(status.job, {})


def show_submission(submission: Submission) -> None:
    """That a job is on its cluster, and what to type next."""
    out = shlex.quote(submission.out)
    facts: dict[str, object] = {
        "job": submission.job_id,
        "cluster": submission.address,
        "state": submission.state,
        "output": submission.out,
        "next": f"latentmill logs {out} --follow   or   latentmill status {out}   or   latentmill cancel {out}",
    }
    print_facts("submitted" if submission.started else "submitted before, and not ended yet", facts)


def show_cancelled(job: JobInfo) -> None:
    """What happens to a job that was told to stop."""
    going = "it stops once the chunks in flight are done; the same `latentmill submit` resumes it"
    _show_job(job, {"next": going if job.state in {"stopping", "stopped"} else "it had ended before"})


def _show_job(job: JobInfo, more: Mapping[str, object]) -> None:
    facts: dict[str, object] = {"cluster": job.address, "state": job.state}
    if job.exit_code:
        facts["exit code"] = job.exit_code
    if job.message and job.state == "unknown":
        facts["message"] = job.message
    good = job.state in {"pending", "running", "succeeded"}
    print_facts(f"job {job.job_id}", facts | dict(more), style="green" if good else "yellow")
    if job.message and job.state == "failed":
        print_untrusted("\n".join(job.message.splitlines()[-_MESSAGE_LINES:]))


def show_models(presets: Mapping[str, ModelPreset]) -> None:
    """The presets that --model knows."""
    rows = [
        [
            name,
            preset.description,
            f"{preset.width}x{preset.height}",
            f"{preset.num_inference_steps} steps, {preset.sampler}, guidance {preset.guidance_scale:g}",
            preset.batch_size,
        ]
        for name, preset in presets.items()
    ]
    print_table("models", ["--model", "what", "size", "defaults", "batch"], rows)
    print_line(
        "--model also takes a diffusers folder, a .safetensors or .ckpt file, a hub id, or NAME=PLACE for a copy."
    )
