"""Answers about a dataset and its files as a person reads them: verified, healed, reported, compared, exported."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from latentmill.jobs.show.display import print_facts, print_table, safe, size
from latentmill.jobs.terminal import print_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from latentmill.jobs.compare.compare import Pair
    from latentmill.jobs.credentials import Credentials
    from latentmill.jobs.exports.export import ExportSummary
    from latentmill.jobs.exports.push import PushSummary
    from latentmill.jobs.inspection import Inspection, Unread
    from latentmill.jobs.outputs.clean import CleanReport
    from latentmill.jobs.outputs.regenerate import RegenerateReport
    from latentmill.jobs.outputs.repair import RepairReport
    from latentmill.jobs.outputs.score import ScoreSummary
    from latentmill.jobs.outputs.verify import VerifyReport
    from latentmill.jobs.scores.duplicates import Duplicates
    from latentmill.jobs.show.comparison import ShownComparison
    from latentmill.jobs.show.report import ReportSummary

_DEFECTS_SHOWN = 20
_PAIRS_SHOWN = 20
_VALUES_SHOWN = 8
_GLYPHS_SHOWN = 8
_PROMPT_SHOWN = 100
_PARAMETER_SHOWN = 24


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
    from latentmill.jobs.compare.compare import ASKED

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
    alone = (*found.added_rows, *found.removed_rows)
    telling = [name for name in ASKED if "prompt" not in name and len({row[name] for row in alone}) > 1]
    for title, rows, total in (
        ("new", found.added_rows, found.added),
        ("gone", found.removed_rows, found.removed),
    ):
        cells = [
            [row["sample_id"], row["row_id"], *(_parameter(row[name]) for name in telling), _prompt(row)]
            for row in rows[:_PAIRS_SHOWN]
        ]
        if cells:
            print_table(f"{title} (first {len(cells)} of {total:,})", ["sample", "row", *telling, "prompt"], cells)


def _parameter(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else safe("" if value is None else str(value), _PARAMETER_SHOWN)


def _prompt(row: Mapping[str, Any]) -> str:
    return safe(row["prompt"], _PROMPT_SHOWN)


def _pair_cells(pair: Pair) -> list[object]:
    one, other, apart = pair.before, pair.after, pair.distance
    status = other["status"] if one["status"] == other["status"] else f"{one['status']} -> {other['status']}"
    shown = ("-", "-") if apart is None else (f"{apart.perceptual:.4f}", f"{apart.pixel:.2f}")
    return [one["sample_id"], other["sample_id"], *shown, status, _prompt(other)]


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
