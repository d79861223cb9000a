"""Every answer of a verb as a person reads it: facts in a frame, tables below."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from typing import TYPE_CHECKING

from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.show.display import duration, print_facts, print_table, print_untrusted, safe, size
from latentmill.jobs.terminal import print_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from latentmill.jobs.compare.compare import Pair
    from latentmill.jobs.credentials import Credentials
    from latentmill.jobs.exports.export import ExportSummary
    from latentmill.jobs.exports.push import PushSummary
    from latentmill.jobs.inspection import Inspection, Unread
    from latentmill.jobs.models.presets import ModelPreset
    from latentmill.jobs.outputs.clean import CleanReport
    from latentmill.jobs.outputs.regenerate import RegenerateReport
    from latentmill.jobs.outputs.repair import RepairReport
    from latentmill.jobs.outputs.score import ScoreSummary
    from latentmill.jobs.outputs.status import StatusReport
    from latentmill.jobs.outputs.verify import VerifyReport
    from latentmill.jobs.plans.summary import Estimate, PlanSummary
    from latentmill.jobs.reuse_preview import ReusePreview
    from latentmill.jobs.runner import RunSummary
    from latentmill.jobs.scores.duplicates import Duplicates
    from latentmill.jobs.show.comparison import ShownComparison
    from latentmill.jobs.show.report import ReportSummary
    from latentmill.jobs.submission.api import JobInfo
    from latentmill.jobs.submission.submission import JobStatus, Submission

_DEFECTS_SHOWN = 20
_PAIRS_SHOWN = 20
_VALUES_SHOWN = 8
_CELLS_SHOWN = 40
_COLUMNS_SHOWN = 20
_COLUMN_SHOWN = 60
_GLYPHS_SHOWN = 8
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
    facts |= {
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
        if word in {"--rate-from", "--gpu-hour-price"}:
            next(words, None)
        elif word != "--measure" and not word.startswith(("--rate-from=", "--gpu-hour-price=")):
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
    """How the run ended, where its files are, and what to type next."""
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
    facts["executor"] = summary.executor
    if summary.left_out:
        facts["left out"] = "; ".join(summary.left_out)
    facts["images"] = f"{summary.out}/images"
    if done:
        facts["dataset"] = f"{summary.out}/dataset"
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
    elif summary.exit_code == 130:
        facts["resume"] = resume_command()
    else:
        facts["next"] = f"{summary.next_command}   the run that ends last publishes"
    unfinished = "interrupted" if summary.exit_code == 130 else f"shard {summary.shard} is done, others are not"
    title = "finished" if summary.exit_code == 0 else "finished with failed samples" if done else unfinished
    print_facts(title, facts, style="green" if summary.exit_code == 0 else "yellow")
    if summary.failures and counts is not None:
        rows = [
            [row.sample_id, row.row_id, safe(row.prompt, _PROMPT_SHOWN), safe(row.error, _ERROR_SHOWN)]
            for row in summary.failures
        ]
        title = f"failed samples (first {len(rows)} of {counts['failed']:,})"
        print_table(title, ["sample", "row", "prompt", "why"], rows)


def resume_command() -> str:
    """The command that resumes the run."""
    return shlex.join(["latentmill", *sys.argv[1:]])


def retry_command() -> str:
    """The command that makes only the failed samples again."""
    typed = sys.argv[1:]
    return shlex.join(["latentmill", *typed, *([] if "--retry-failed" in typed else ["--retry-failed"])])


def show_status(report: StatusReport) -> None:
    """The progress of a job."""
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
    print_facts(report.out, facts, style="green" if report.published else "yellow")


def show_job_status(status: JobStatus) -> None:
    """The progress of a job in its output, and its state on its cluster."""
    if status.report is not None:
        show_status(status.report)
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


def show_verify(report: VerifyReport) -> None:
    """What was read again, and the defects found."""
    facts: dict[str, object] = {
        "read": f"{report.rows:,} rows in {report.chunks:,} chunks, {report.images_checked:,} images, "
        f"{report.parts_checked:,} dataset parts, {size(report.bytes_read)}",
        "defects": f"{len(report.defects):,}" if report.defects else "none",
        **_regenerate_facts(report),
        **_repair_facts(report),
        "plan hash": report.plan_hash[:16],
    }
    if report.defects:
        facts["next"] = f"latentmill repair {shlex.quote(report.out)}"
    print_facts(
        "verified" if not report.defects else "NOT as written", facts, style="red" if report.defects else "green"
    )
    if report.defects:
        shown = report.defects[:_DEFECTS_SHOWN]
        rows = [[defect.kind, defect.path, defect.detail] for defect in shown]
        print_table(f"defects (first {len(rows)} of {len(report.defects):,})", ["kind", "where", "what"], rows)


def _regenerate_facts(report: VerifyReport) -> dict[str, object]:
    if report.regenerate_seed is None:
        return {}
    counts = Counter(sample.outcome for sample in report.regenerated)
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
    return {"made again": f"{len(report.regenerated):,} samples drawn by seed {report.regenerate_seed}: {outcomes}"}


def show_regenerated(report: RegenerateReport) -> None:
    """One line for each sample, then what it was drawn on and where it lies."""
    for sample in report.samples:
        status = "" if sample.status == "ok" else f" ({sample.status})"
        print_line(safe(f"{sample.sample_id}{status}: {sample.words}"))
    facts: dict[str, object] = {"drawn on": "; ".join(report.execution_classes) or "nothing: no model was loaded"}
    if not all(sample.outcome == "identical" for sample in report.samples):
        facts["tolerance"] = f"a mean difference of {report.tolerance:g} of 255, on another execution class only"
    if any(sample.file for sample in report.samples):
        facts["pictures"] = report.destination
    counts = Counter(sample.outcome for sample in report.samples)
    title = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
    print_facts(title, facts, style="red" if report.exit_code else "green")


def show_repair(report: RepairReport) -> None:
    """What was restored, and what was not, with the reason."""
    counts = Counter(defect.kind for defect in report.healed)
    facts: dict[str, object] = {
        "found": f"{report.defects:,} defects" if report.defects else "nothing to heal",
        "healed": f"{len(report.healed):,}"
        + (f": {', '.join(f'{count:,} {kind}' for kind, count in sorted(counts.items()))}" if counts else ""),
        "pictures": f"{report.generated:,} made again; each accepted only with its row's own digest",
    }
    if report.unhealed:
        facts["not healed"] = f"{len(report.unhealed):,}"
    facts["plan hash"] = report.plan_hash[:16]
    facts["next"] = f"latentmill verify {shlex.quote(report.out)}"
    print_facts(
        "NOT all healed" if report.unhealed else "healed" if report.defects else "whole",
        facts,
        style="red" if report.unhealed else "green",
    )
    if report.unhealed:
        rows = [[defect.kind, defect.path, defect.reason] for defect in report.unhealed[:_DEFECTS_SHOWN]]
        print_table(f"not healed (first {len(rows)} of {len(report.unhealed):,})", ["kind", "where", "why"], rows)


def _repair_facts(report: VerifyReport) -> dict[str, object]:
    facts: dict[str, object] = {}
    if report.repairs:
        facts["repairs"] = f"{report.repairs:,} repair records, which the rows include"
    if report.superseded_parts:
        facts["superseded"] = f"{report.superseded_parts:,} parts of another publication, until `clean` removes them"
    return facts


def show_clean(report: CleanReport) -> None:
    """What was removed, what was kept, and why."""
    facts: dict[str, object] = {
        "would remove" if report.dry_run else "removed": f"{report.objects:,} objects, {size(report.bytes)}",
        "lost attempts": f"{report.attempts:,} with {report.images:,} images",
        "leftovers": f"{report.temporary_files:,} temporary files, {report.probes:,} probes, "
        f"{report.parts:,} dataset parts that nothing refers to; a day old at least",
    }
    if report.open_attempts:
        facts["kept"] = f"{report.open_attempts:,} attempts at chunks or repairs that are not committed yet"
    if report.unreadable_chunks:
        first = ", ".join(map(str, report.unreadable_chunks[:_VALUES_SHOWN]))
        facts["unreadable"] = f"{len(report.unreadable_chunks):,} chunks with damaged records, first {first}"
        facts["next"] = f"latentmill verify {shlex.quote(report.out)}"
    elif report.dry_run and report.objects:
        facts["next"] = f"latentmill clean {shlex.quote(report.out)}"
    title = "dry run, nothing was deleted" if report.dry_run else "clean"
    print_facts(title, facts, style="yellow" if report.exit_code or report.dry_run else "green")


def show_report(report: ReportSummary) -> None:
    """Where the gallery and the sheets are, and what is on them."""
    gallery = report.gallery
    rows = f"{gallery.rows:,} of {gallery.samples:,} samples"
    if gallery.state != "published":
        rows += ", as the ledger has them now; --live follows the job"
    elif gallery.rows < gallery.samples:
        rows += "; --max-pictures shows more"
    facts: dict[str, object] = {
        "gallery": f"{report.out}/{gallery.page}",
        "in it": f"{rows}; {gallery.thumbnails:,} thumbnails are new",
        "sheets": f"{len(report.sheets)} with {report.samples_shown:,} of {report.samples:,} samples"
        + ("" if report.samples_shown == report.samples else "; --max-sheets shows more"),
    }
    if gallery.state != "published":
        facts["sheets"] = "none: they are drawn of a finished dataset"
    unreadable = max(report.unreadable, gallery.unreadable)
    if unreadable:
        facts["unreadable"] = f"{unreadable:,} pictures, to be healed by: latentmill repair {shlex.quote(report.out)}"
    if report.without_glyph:
        named = " ".join(f"U+{ord(character):04X}" for character in report.without_glyph[:_GLYPHS_SHOWN])
        facts["no glyph"] = (
            f"{len(report.without_glyph):,} characters are boxes on the sheets ({named}): install a font that has "
            f"them, or name one by --font; the gallery shows them with the browser's"
        )
    facts |= {f"sheet {number}": f"{report.out}/{path}" for number, path in enumerate(report.sheets[:5], start=1)}
    if len(report.sheets) > 5:
        facts["more"] = f"{report.out}/report"
    print_facts("report", facts)


def show_scores(summary: ScoreSummary) -> None:
    """What was scored, and between which values."""
    rows = []
    for scorer in summary.scorers:
        there = scorer.parts - scorer.written
        parts = f"{scorer.parts:,}" + (f", of which {there:,} were there" if there else "")
        for column, ends in scorer.columns.items():
            shown = ["", "", ""] if ends is None else [f"{value:.4g}" for value in ends]
            rows.append([column, f"{scorer.scored:,} of {scorer.rows:,}", *shown, parts])
    print_table("scores", ["column", "scored", "least", "mean", "greatest", "parts"], rows)
    for scorer in summary.scorers:
        if scorer.duplicates is not None:
            _show_duplicates(scorer.duplicates)


def _show_duplicates(found: Duplicates) -> None:
    if found.not_compared is not None:
        print_line(f"note: only equal hashes were looked for: {found.not_compared}")
    pairs = found.pairs[:_PAIRS_SHOWN]
    title = f"near duplicates, up to {found.distance} bits apart (first {len(pairs)} of {found.total:,})"
    print_table(
        title, ["sample", "looks like", "bits apart"], [[pair.second, pair.first, pair.distance] for pair in pairs]
    )


def show_comparison(shown: ShownComparison) -> None:
    """What is the same and what is not, and what changed most."""
    found = shown.found
    facts: dict[str, object] = {
        "before": found.before.url,
        "after": found.after.url,
        "identical": f"{found.identical:,}",
        "changed": f"{found.changed:,}",
        "new": f"{found.added:,}",
        "gone": f"{found.removed:,}",
    }
    if found.tolerance:
        facts["within tolerance"] = f"{found.within_tolerance:,} changed by up to {found.tolerance:g}"
    if found.settings:
        first = found.settings[:_VALUES_SHOWN]
        more = len(found.settings) - len(first)
        facts["jobs differ in"] = "; ".join(first) + (f"; and {more:,} more" if more else "")
    if shown.page is not None:
        facts["page"] = shown.page
    print_facts("different" if found.exit_code else "the same", facts, style="yellow" if found.exit_code else "green")
    pairs = found.pairs[:_PAIRS_SHOWN]
    if pairs:
        columns = ["before", "after", "perceptual", "pixels", "status", "prompt"]
        print_table(
            f"changed (first {len(pairs)} of {found.changed:,})", columns, [_pair_cells(pair) for pair in pairs]
        )
    for title, rows, total in (
        ("new", found.added_rows, found.added),
        ("gone", found.removed_rows, found.removed),
    ):
        cells = [[row["sample_id"], row["row_id"], safe(row["prompt"], _PROMPT_SHOWN)] for row in rows[:_PAIRS_SHOWN]]
        if cells:
            print_table(f"{title} (first {len(cells)} of {total:,})", ["sample", "row", "prompt"], cells)


def _pair_cells(pair: Pair) -> list[object]:
    one, other, apart = pair.before, pair.after, pair.distance
    status = other["status"] if one["status"] == other["status"] else f"{one['status']} -> {other['status']}"
    shown = ("-", "-") if apart is None else (f"{apart.perceptual:.4f}", f"{apart.pixel:.2f}")
    return [one["sample_id"], other["sample_id"], *shown, status, safe(other["prompt"], _PROMPT_SHOWN)]


def show_export(summary: ExportSummary) -> None:
    """What was written, and where."""
    there = summary.shards - summary.written
    rows = ", ".join(f"{count:,} {split}" for split, count in summary.rows.items())
    facts: dict[str, object] = {
        "rows": f"{sum(summary.rows.values()):,}" if len(summary.rows) == 1 else rows,
        "shards": f"{summary.shards:,}" + (f", of which {there:,} were there" if there else ""),
        "size": f"{size(summary.bytes)} in {summary.files:,} files",
        "export": summary.dest,
    }
    print_facts(f"exported to {summary.to}", facts)


def show_push(summary: PushSummary) -> None:
    """Where the export is now."""
    print_facts("pushed", {"from": summary.dest, "repository": summary.repo, "at": summary.url})


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


def show_inspections(answers: Sequence[Inspection | Unread]) -> None:
    """One line per file, as grep would print it, and below it what else the file says."""
    from latentmill.jobs.inspection import Unread

    for answer in answers:
        if isinstance(answer, Unread):
            print_line(f"error: {safe(answer.error)}", error=True)
            continue
        print_line(f"{safe(answer.file)}: {_watermark_words(answer)}")
        facts = {
            "source type (XMP)": answer.digital_source_type or "not stated",
            "C2PA": _credentials_words(answer.c2pa),
            "parameters": safe(answer.parameters or "none", 200),
        }
        if answer.row is not None:
            facts["row"] = "sample {sample_id}, {status}, {image}".format(**answer.row)
        for name, value in facts.items():
            print_line(f"  {name}: {safe(value)}")


def _credentials_words(found: Credentials | None) -> str:
    from latentmill.jobs.credentials import EXTRA

    if found is None:
        return "not looked for in this format"
    match found.state:
        case "none":
            return "none"
        case "not checked":
            return f"there, not checked: install {EXTRA}"
        case "invalid":
            return f"INVALID: {', '.join(found.failures)}"
    by = ", ".join(text for text in (found.signer, found.issuer) if text)
    when = f" at {found.time}" if found.time else ""
    trusted = "trusted" if found.state == "trusted" else "valid, by a certificate that is not trusted here"
    return f"{trusted}; signed by {by}{when}; made by {found.generator}; source type {found.digital_source_type}"


def _watermark_words(answer: Inspection) -> str:
    reading = answer.watermark
    if reading is None:
        return f"{answer.width}x{answer.height} pixels, too few for a watermark"
    verdict = "found" if reading.found else "not found"
    return (
        f"{verdict}, {reading.method}, {reading.bits_matching} of {reading.bits} bits "
        f"({reading.bit_accuracy:.0%}; chance gives fewer than {reading.bits_needed}): {safe(reading.text)}"
    )
