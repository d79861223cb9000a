"""The command `latentmill`: each verb parses its flags, calls one function of jobs/, and prints the answer.

Nothing heavy is imported before a verb runs, so that `--help` answers at once. A job's flags come from its settings.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from latentmill.jobs.exports.spec import EXPORT_SETTINGS, HOW
from latentmill.jobs.flags import QUIET, Say, flag, takes_a_job, takes_settings
from latentmill.jobs.scores.spec import SCORE_SETTINGS, SCORING
from latentmill.jobs.settings import RUNNING
from latentmill.jobs.show.refusals import run_app

_TIME = "Time and cost"
_MAKE, _LOOK, _MORE = "Make images", "Look at a dataset", "More"

app = typer.Typer(
    name="latentmill",
    help="Prompts in, a verified image dataset out: distributed batch generation with latent diffusion models on Ray.",
    epilog="Start with: [bold]latentmill run --out out/sample[/bold], which draws the sample prompts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


Json = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="The output of a job: a folder or a URL.")]

TargetArgument = Annotated[
    str,
    typer.Argument(metavar="JOB_OR_OUT", help="The id of a submitted job, or the output of any: a folder or a URL."),
]
Address = Annotated[
    str | None, typer.Option("--address", help="The cluster's dashboard, http://HEAD:8265, where it is not known.")
]


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill plan prompts.csv --sweep guidance_scale=3,5,7.5 --sweep seed=0:16[/bold]",
)
@takes_a_job
def plan(
    config: str | None,
    flags: dict[str, Any],
    say: Say,
    *,
    measure: Annotated[
        bool, flag("--measure", _TIME, "Load the model and time a few batches, to say how long a run takes.")
    ] = False,
    rate_from: Annotated[
        str | None, flag("--rate-from", _TIME, "OUT of an earlier job, whose records say how long a run takes.")
    ] = None,
) -> None:
    """Say what a run would do, and write nothing."""
    from latentmill.jobs.job_file import resolve
    from latentmill.jobs.plans.planning import draft_plan
    from latentmill.jobs.reuse_preview import preview_reuse

    with draft_plan(resolve(config, flags, or_sample=True)) as draft:
        summary, reuse = draft.summary(), preview_reuse(draft)
        if measure or rate_from is not None or flags["gpu_hour_price"] is not None:
            from latentmill.jobs.estimate import with_estimate  # it brings the engine along

            price = draft.spec.runtime.gpu_hour_price
            summary = with_estimate(draft, summary, measure=measure, rate_from=rate_from, price=price)
    answer = summary.to_dict() | ({} if reuse is None else {"reuse": reuse.to_dict()})
    _answer(answer, say.as_json, lambda views: views.show_plan(summary, reuse, quiet=say.quiet))


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill run prompts.txt --out out/birds[/bold]\n\n"
    "Without PROMPTS it draws the sample prompts of the package. The same command again resumes where it stopped. "
    "Exit codes: 0 complete, 1 failed samples, 2 usage, 3 the output belongs to another plan, 4 this shard is done and "
    "others are not, 130 interrupted.",
)
@takes_a_job
def run(config: str | None, flags: dict[str, Any], say: Say) -> None:
    """Make the dataset, or go on with it: every image exactly once."""
    from dataclasses import asdict

    from latentmill.jobs.show.running import run_shown

    summary = run_shown(config, flags, quiet=say.quiet)
    _answer(asdict(summary), say.as_json, lambda views: views.show_run(summary), quiet=say.quiet)
    raise typer.Exit(summary.exit_code)


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill submit prompts.csv --out s3://bucket/birds --address http://head:8265[/bold]\n\n"
    "The cluster plans and runs the job by itself; submitting it again finds it, or resumes it once it has ended. The "
    "nodes need this project's Python packages, RAY_AUTH_MODE=token, and credentials for --out; a local manifest is "
    "copied there.",
)
@takes_a_job
def submit(
    config: str | None,
    flags: dict[str, Any],
    say: Say,
    *,
    shared_filesystem: Annotated[
        bool, flag("--shared-filesystem", RUNNING, "Local paths are the same on all nodes, which mount them.")
    ] = False,
    env: Annotated[
        list[str] | None,
        flag(
            "--env",
            RUNNING,
            "NAME of a variable to hand to the job; may be repeated. The cluster keeps it in clear text; nodes with "
            "credentials of their own for --out need none.",
        ),
    ] = None,
) -> None:
    """Hand a job to a cluster, which runs it without this machine."""
    from dataclasses import asdict

    from latentmill.jobs.job_file import resolve
    from latentmill.jobs.submission.submission import submit_job

    submission = submit_job(resolve(config, flags), shared_filesystem=shared_filesystem, forwarded=env or [])
    _answer(asdict(submission), say.as_json, lambda views: views.show_submission(submission), quiet=say.quiet)


@app.command(
    rich_help_panel=_MAKE,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def txt2img(context: typer.Context) -> None:
    """Draw a few pictures for a prompt: the original Stable Diffusion script's command, option for option."""
    from latentmill.jobs.txt2img.command import run_command

    raise typer.Exit(run_command(context.args))


@app.command(rich_help_panel=_LOOK, epilog="Example: [bold]latentmill status out/sample --json[/bold]")
def status(
    target: TargetArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every commit record to count the results so far.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on looking until it is published, or has ended on its cluster.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="Seconds from one look of --watch to the next.")] = 10,
    gpu_hour_price: Annotated[
        float | None, typer.Option("--gpu-hour-price", min=0, help="What an hour of a GPU costs, to say what it cost.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Say how far a job is, and its state on its cluster if it was submitted to one: exit code 1 if it failed."""
    if watch:
        from latentmill.jobs.show.watching import watch as watch_job

        raise typer.Exit(watch_job(target, every=every, deep=deep, address=address, price=gpu_hour_price, as_json=json))
    from latentmill.jobs.submission.submission import job_status

    answer = job_status(target, deep=deep, address=address)
    _answer(answer.to_dict(), json, lambda views: views.show_job_status(answer, gpu_hour_price))
    raise typer.Exit(answer.exit_code)


@app.command(rich_help_panel=_LOOK, epilog="Example: [bold]latentmill logs s3://bucket/birds --follow[/bold]")
def logs(
    target: TargetArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Show what a submitted job says; with --follow, exit as it does."""
    from latentmill.jobs.show.display import print_untrusted
    from latentmill.jobs.submission.submission import job_logs

    job = job_logs(target, print_untrusted, follow=follow, address=address)
    raise typer.Exit(job.cli_exit_code if follow else 0)


@app.command(rich_help_panel=_MAKE, epilog="Example: [bold]latentmill cancel s3://bucket/birds[/bold]")
def cancel(target: TargetArgument, address: Address = None, json: Json = False) -> None:
    """Stop a submitted job: chunks in flight finish, no more begin, and the same job submitted again resumes."""
    from dataclasses import asdict

    from latentmill.jobs.submission.submission import cancel_job

    job = cancel_job(target, address=address)
    _answer(asdict(job), json, lambda views: views.show_cancelled(job))


@app.command(rich_help_panel=_LOOK, epilog="Example: [bold]latentmill verify s3://bucket/dataset --sample 1000[/bold]")
def verify(
    out: OutArgument,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Read only this many images, drawn at random.")
    ] = None,
    regenerate: Annotated[
        int, typer.Option("--regenerate", min=0, help="Make so many samples again, drawn by --seed, and compare.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What draws the samples of --regenerate.")] = 42,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
) -> None:
    """Read everything again and compare it with what was written; exit code 1 if anything differs."""
    from latentmill.jobs.show.display import progress_view, verify_detail

    with progress_view("reading", verify_detail, quiet=quiet) as view:
        from latentmill.jobs.outputs.verify import verify as verify_job

        report = verify_job(
            out, sample_n=sample, regenerate_n=regenerate, regenerate_seed=seed, on_progress=view.update
        )
    _answer(report.to_dict(), json, lambda views: views.show_verify(report), quiet=quiet, about="dataset_views")
    raise typer.Exit(report.exit_code)


@app.command(
    rich_help_panel=_LOOK,
    epilog="Example: [bold]latentmill repair s3://bucket/dataset[/bold]\n\n"
    "Exit codes: 0 all is as it was written, 1 something is not and is named with the reason.",
)
def repair(out: OutArgument, json: Json = False) -> None:
    """Heal what `verify` finds: pictures made again to the byte, the dataset published again from the ledger."""
    from latentmill.jobs.show.display import progress_view, verify_detail

    with progress_view("reading", verify_detail) as view:
        from latentmill.jobs.outputs.repair import repair as repair_job

        report = repair_job(out, on_progress=view.update)
    _answer(report.to_dict(), json, lambda views: views.show_repair(report), about="dataset_views")
    raise typer.Exit(report.exit_code)


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill regenerate s3://bucket/dataset --sample 48113[/bold]\n\n"
    "Exit codes: 0 every picture came out to the bit, or within --tolerance on another execution class; 1 one did not, "
    "or has no picture.",
)
def regenerate(
    out: OutArgument,
    sample: Annotated[
        list[str], typer.Option("--sample", help="Numbers of samples: 17 or 3,8,20:24; may be repeated.")
    ],
    to: Annotated[
        str | None, typer.Option("--out", help="Where the pictures go; by default OUT-regenerated, beside OUT.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda; auto is that of the row, where there is one.")
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, max=4096, help="In place of the bulk run's: faster, and other bits."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0, max=255, help="Mean difference of 255 on another execution class."),
    ] = 1.0,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
) -> None:
    """Make single pictures again from their rows, as the bulk run made them, and say whether they are the same."""
    from latentmill.jobs.show.display import progress_view

    with progress_view("reading", lambda _: "", quiet=quiet) as view:
        from latentmill.jobs.outputs.redraw import Drawing
        from latentmill.jobs.outputs.regenerate import parse_samples
        from latentmill.jobs.outputs.regenerate import regenerate as regenerate_samples

        drawing = Drawing(device=device, batch_size=batch_size, tolerance=tolerance)
        report = regenerate_samples(
            out, parse_samples(sample), destination=to, drawing=drawing, on_progress=view.update
        )
    _answer(report.to_dict(), json, lambda views: views.show_regenerated(report), quiet=quiet, about="dataset_views")
    raise typer.Exit(report.exit_code)


@app.command(rich_help_panel=_MORE, epilog="Example: [bold]latentmill clean s3://bucket/dataset --dry-run[/bold]")
def clean(
    out: OutArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and delete nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove what interrupted runs left behind: only proven garbage, safe beside a running job."""
    from latentmill.jobs.outputs.clean import clean as clean_job

    report = clean_job(out, dry_run=dry_run)
    _answer(report.to_dict(), json, lambda views: views.show_clean(report), about="dataset_views")
    raise typer.Exit(report.exit_code)


@app.command(
    rich_help_panel=_LOOK,
    epilog="Example: [bold]latentmill report out/sample[/bold], then open out/sample/report/index.html in a browser",
)
def report(
    out: OutArgument,
    max_sheets: Annotated[int, typer.Option("--max-sheets", min=0, help="Draw no more contact sheets than this.")] = 20,
    max_pictures: Annotated[
        int, typer.Option("--max-pictures", min=1, help="The gallery shows the first so many samples.")
    ] = 100_000,
    thumbnail: Annotated[
        int, typer.Option("--thumbnail", min=32, max=1024, help="Pixels of a thumbnail's longest side.")
    ] = 256,
    font: Annotated[
        str | None, typer.Option("--font", metavar="FILE", help="A .ttf or .otf file for the sheets' labels.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Go on until the job is done; the open page follows.")] = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
) -> None:
    """Write a gallery for the browser, and labelled contact sheets once the dataset is finished."""
    from latentmill.jobs.show.display import progress_view

    with progress_view("opening", lambda _: "", quiet=quiet) as view:
        from latentmill.jobs.show.report import report as write_report

        summary = write_report(
            out,
            max_sheets=max_sheets,
            max_pictures=max_pictures,
            thumbnail=thumbnail,
            live=live,
            font=font,
            on_progress=view.update,
        )
    _answer(summary.to_dict(), json, lambda views: views.show_report(summary), quiet=quiet, about="dataset_views")


@app.command(
    rich_help_panel=_LOOK,
    epilog="Example: [bold]latentmill compare s3://bucket/sweep/latest --out pairs[/bold], tonight with last night\n\n"
    "Exit codes: 0 the same, 1 something changed, is new or is gone, 2 they cannot be compared.",
)
def compare(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="An output; alone, tonight's: its day or 'latest'.")],
    after: Annotated[str | None, typer.Argument(metavar="[AFTER]", help="The output to compare it with.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder or URL for a page of the pairs.")] = None,
    top: Annotated[int, typer.Option("--top", help="Pairs that are shown and listed, the biggest change first.")] = 200,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Perceptual distance (1 - SSIM) that counts as no change.")
    ] = 0.0,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A parameter that may differ in a pair; may be repeated.")
    ] = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
) -> None:
    """Compare two datasets, sample by sample: what is the same, changed and by how much, new or gone."""
    from latentmill.jobs.show.display import progress_view

    with progress_view("opening", lambda _: "", quiet=quiet) as view:
        from latentmill.jobs.show.comparison import compare_outputs

        shown = compare_outputs(
            before, after, out, top=top, tolerance=tolerance, ignored=ignore or (), on_progress=view.update
        )
    _answer(shown.to_dict(), json, lambda views: views.show_comparison(shown), quiet=quiet, about="dataset_views")
    raise typer.Exit(shown.found.exit_code)


@app.command(
    rich_help_panel=_LOOK,
    epilog="Example: [bold]latentmill export out/sample --to hf --out out/sample-hf --image-format webp[/bold]\n\n"
    "The same command again resumes where it stopped. Exit codes: 0 complete, 2 usage, 3 --out holds another export.",
)
@takes_settings(EXPORT_SETTINGS, HOW)
def export(flags: dict[str, Any], say: Say, *, dataset: OutArgument) -> None:
    """Write a published dataset in another tool's form, every picture checked; the same export has the same bytes."""
    from latentmill.jobs.show.display import progress_view

    with progress_view("opening", lambda _: "", quiet=say.quiet) as view:
        from latentmill.jobs.exports.export import export as export_job
        from latentmill.jobs.exports.spec import make_export_spec

        summary = export_job(dataset, make_export_spec(flags), on_progress=view.update)
    _answer(
        summary.to_dict(), say.as_json, lambda views: views.show_export(summary), quiet=say.quiet, about="dataset_views"
    )


@app.command(
    "push-to-hub",
    rich_help_panel=_MORE,
    epilog="Example: [bold]latentmill push-to-hub out/sample-hf me/birds --private[/bold]\n\n"
    "The token is that of HF_TOKEN, or of `hf auth login`.",
)
def push_to_hub(
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A finished export: a folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME of a dataset; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made shall be private.")] = False,
    json: Json = False,
) -> None:
    """Upload a finished export to the Hugging Face hub."""
    from latentmill.jobs.exports.push import push_to_hub as push

    summary = push(dest, repo, private=private)
    _answer(summary.to_dict(), json, lambda views: views.show_push(summary), about="dataset_views")


@app.command(
    rich_help_panel=_LOOK,
    epilog="Example: [bold]latentmill score out/sample --with sharpness,phash[/bold]\n\n"
    "The same command again resumes where it stopped. Exit codes: 0 complete, 2 usage, 3 scores of another version "
    "are there.",
)
@takes_settings(SCORE_SETTINGS, SCORING)
def score(
    flags: dict[str, Any],
    say: Say,
    *,
    dataset: OutArgument,
    scorers: Annotated[str, flag("--with", SCORING, "NAME[,NAME...]: the scorers.")],
) -> None:
    """Add columns of scores to a published dataset, beside its files, every picture checked."""
    from latentmill.jobs.show.display import progress_view

    with progress_view("opening", lambda _: "", quiet=say.quiet) as view:
        from latentmill.jobs.outputs.score import score as score_dataset
        from latentmill.jobs.scores.spec import make_score_spec

        summary = score_dataset(dataset, scorers.split(","), make_score_spec(flags), on_progress=view.update)
    _answer(
        summary.to_dict(), say.as_json, lambda views: views.show_scores(summary), quiet=say.quiet, about="dataset_views"
    )


@app.command(rich_help_panel=_MORE, epilog="Example: [bold]latentmill models[/bold]")
def models(json: Json = False) -> None:
    """List the models that --model knows by name."""
    from latentmill.jobs.models.presets import list_presets

    presets = list_presets()
    as_data = {name: preset.model_dump() for name, preset in presets.items()}
    _answer(as_data, json, lambda views: views.show_models(presets))


@app.command(rich_help_panel=_MORE, epilog="Example: [bold]latentmill inspect out/sample/images/*/*/*.png[/bold]")
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Picture files or URLs.")],
    expect: Annotated[
        str, typer.Option("--expect", "--watermark-text", help="The watermark to look for.")
    ] = "StableDiffusionV1",
    watermark: Annotated[
        str | None, typer.Option("--watermark", help="dwtDctSvd or dwtDct; without it, whichever fits best.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="OUT", help="A published output, to look up each file's row.")
    ] = None,
    trust: Annotated[
        str | None, typer.Option("--trust", metavar="PEM", help="Certificates that signers by C2PA may follow from.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what pictures carry: watermark, XMP, C2PA, parameters; exit code 1 if one lacks the mark or was changed."""
    from latentmill.jobs.inspection import inspect_files

    answers = inspect_files(files, text=expect, method=watermark, dataset=dataset, trust=trust)
    _answer(
        [answer.to_dict() for answer in answers],
        json,
        lambda views: views.show_inspections(answers),
        about="dataset_views",
    )
    raise typer.Exit(0 if all(answer.sound for answer in answers) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from latentmill.jobs.ledger.records import tool_versions

        sys.stdout.write(f"latentmill {tool_versions()['latentmill']}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def _answer(
    data: Any, as_json: bool, show: Callable[[Any], None], *, quiet: bool = False, about: str = "views"
) -> None:
    """Print an answer: as JSON, or as `show` has it of a module of jobs/show/, which other answers need not import."""
    from latentmill.jobs.show import display

    if as_json:
        display.print_json(data)
    elif not quiet:
        show(import_module(f"latentmill.jobs.show.{about}"))


def main() -> None:
    """The console entry."""
    atexit.register(gc.freeze)  # else Python goes through all that torch has made, twice, before it ends: 0.2 s
    run_app(app)
