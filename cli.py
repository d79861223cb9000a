"""The command `latentmill`: each verb parses its flags, calls one function of jobs/, and prints the answer.

Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

_INPUT = "Input and output"
_PICTURE = "Pictures"
_SAFETY = "Safety and watermark"
_CUTTING = "Chunks and batches"
_RUNNING = "Where it runs (never changes a picture)"
_MAKE, _LOOK, _MORE = "Make images", "Look at a dataset", "More"

app = typer.Typer(
    name="latentmill",
    help="Prompts in, a verified image dataset out: distributed batch generation with latent diffusion models on Ray.",
    epilog="Start with: [bold]latentmill run configs/prompts/sample.txt --out out/sample[/bold]",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
watermark_app = typer.Typer(help="The invisible mark in the pictures.", no_args_is_help=True)
app.add_typer(watermark_app, name="watermark", rich_help_panel=_MORE)

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="The output of a job: a folder or a URL.")]

TargetArgument = Annotated[
    str,
    typer.Argument(metavar="JOB_OR_OUT", help="The id of a submitted job, or the output of any: a folder or a URL."),
]
Address = Annotated[
    str | None, typer.Option("--address", help="The cluster's dashboard, http://HEAD:8265, where it is not known.")
]


def _flag(name: str, panel: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False, **more)


def _job_flags(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS", help="Prompt files, globs or URLs: .txt .csv .tsv .jsonl .parquet .png, gzip too."
        ),
    ] = None,
    config: Annotated[str | None, _flag("--config", _INPUT, "A job file; flags override it. See configs/jobs.")] = None,
    manifest_format: Annotated[
        str | None,
        _flag(
            "--manifest-format",
            _INPUT,
            "How .txt is read: lines, parameters (web UIs' blocks) or flags (--prompt ...).",
        ),
    ] = None,
    out: Annotated[str | None, _flag("--out", _INPUT, "Folder or URL (s3://...) of the dataset. Default: out.")] = None,
    date: Annotated[
        str | None, _flag("--date", _INPUT, "The day that {date} in --out stands for, YYYY-MM-DD. Default: today, UTC.")
    ] = None,
    format: Annotated[str | None, _flag("--format", _INPUT, "How pictures are stored: files.")] = None,  # noqa: A002 - the flag's name
    strict: Annotated[bool | None, _flag("--strict", _INPUT, "Refuse the job if any row is bad.")] = None,
    model: Annotated[
        str | None,
        _flag(
            "--model",
            _PICTURE,
            "A preset (see `latentmill models`), PRESET=PLACE, folder, .safetensors, .ckpt, s3://... or hub id.",
        ),
    ] = None,
    revision: Annotated[str | None, _flag("--revision", _PICTURE, "Commit or branch of a hub id.")] = None,
    tokenizer: Annotated[
        str | None, _flag("--tokenizer", _PICTURE, "Folder or hub id of the vocabulary, for a single file.")
    ] = None,
    prediction_type: Annotated[
        str | None,
        _flag("--prediction-type", _PICTURE, "What a single file predicts: epsilon, v_prediction or sample."),
    ] = None,
    timestep_spacing: Annotated[
        str | None,
        _flag("--timestep-spacing", _PICTURE, "leading, trailing, linspace or original, in place of the model's own."),
    ] = None,
    prompt_syntax: Annotated[
        str | None,
        _flag("--prompt-syntax", _PICTURE, "Brackets: plain (text), a1111 (x:1.2) or novelai {x}. Default: plain."),
    ] = None,
    long_prompts: Annotated[
        str | None,
        _flag("--long-prompts", _PICTURE, "Too many tokens: truncate, chunk or error. Default: truncate."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        _flag("--sweep", _PICTURE, "AXIS=VALUES, each value with every row; may be repeated. Ranges: seed=0:16."),
    ] = None,
    num_images: Annotated[int | None, _flag("--num-images", _PICTURE, "Images per row, with seeds s, s+1, ...")] = None,
    negative_prompt: Annotated[str | None, _flag("--negative-prompt", _PICTURE, "What should not be seen.")] = None,
    seed: Annotated[int | None, _flag("--seed", _PICTURE, "First seed; samples count on from it. Default: 42.")] = None,
    width: Annotated[int | None, _flag("--width", _PICTURE, "Pixels, a multiple of the model's factor.")] = None,
    height: Annotated[int | None, _flag("--height", _PICTURE, "Pixels, a multiple of the model's factor.")] = None,
    num_inference_steps: Annotated[int | None, _flag("--num-inference-steps", _PICTURE, "Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, _flag("--guidance-scale", _PICTURE, "How strongly the prompt counts; 1 is without guidance.")
    ] = None,
    sampler: Annotated[
        str | None,
        _flag(
            "--sampler", _PICTURE, "ddim, plms, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde (or with _karras), lcm."
        ),
    ] = None,
    eta: Annotated[float | None, _flag("--eta", _PICTURE, "Noise added while sampling (DDIM), 0 to 1.")] = None,
    safety: Annotated[
        str | None, _flag("--safety", _SAFETY, "Checker: auto, open-nsfw, clip-concepts or none. Default: auto.")
    ] = None,
    nsfw_threshold: Annotated[
        float | None, _flag("--nsfw-threshold", _SAFETY, "open-nsfw score that flags a picture. Default: 0.8.")
    ] = None,
    on_flagged: Annotated[
        str | None, _flag("--on-flagged", _SAFETY, "Flagged pictures: blank, drop or keep. Default: blank.")
    ] = None,
    watermark: Annotated[
        str | None, _flag("--watermark", _SAFETY, "Invisible mark: dwtDctSvd, dwtDct or none. Default: dwtDctSvd.")
    ] = None,
    watermark_text: Annotated[
        str | None, _flag("--watermark-text", _SAFETY, "The mark, up to 32 bytes. Default: StableDiffusionV1.")
    ] = None,
    watermark_policy: Annotated[
        str | None,
        _flag(
            "--watermark-policy",
            _SAFETY,
            "A mark that cannot be read back: record it, require one (the sample fails), or retry by dwtDctSvd first.",
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, _flag("--chunk-size", _CUTTING, "Samples per chunk, the unit of work and commit. Default: 32.")
    ] = None,
    batch_size: Annotated[
        int | None, _flag("--batch-size", _CUTTING, "Samples per forward pass, always padded.")
    ] = None,
    dtype: Annotated[str | None, _flag("--dtype", _CUTTING, "auto, float32 or float16.")] = None,
    device: Annotated[str | None, _flag("--device", _CUTTING, "auto, cpu or cuda.")] = None,
    accelerator_type: Annotated[
        str | None,
        _flag("--accelerator-type", _CUTTING, "Use only the cluster's GPUs of this type, e.g. H100: bits differ."),
    ] = None,
    allow_mixed_accelerators: Annotated[
        bool | None,
        _flag("--allow-mixed-accelerators", _CUTTING, "Use GPUs of any type, though the bits of pictures differ."),
    ] = None,
    threads_per_actor: Annotated[
        int | None, _flag("--threads-per-actor", _CUTTING, "CPU threads per model; the pictures' bits depend on it.")
    ] = None,
    executor: Annotated[
        str | None, _flag("--executor", _RUNNING, "ray, or inline for this process. Default: ray.")
    ] = None,
    address: Annotated[
        str | None,
        _flag(
            "--address",
            _RUNNING,
            "Ray cluster, HOST:6379; default RAY_ADDRESS, else one on this machine. For submit: http://HEAD:8265.",
        ),
    ] = None,
    insecure_ray: Annotated[
        bool | None,
        _flag("--insecure-ray", _RUNNING, "Join a cluster without token authentication: anyone can run code on it."),
    ] = None,
    retry_failed: Annotated[
        bool | None,
        _flag("--retry-failed", _RUNNING, "Make the samples that failed once more; all others stay as they are."),
    ] = None,
    chunk_timeout: Annotated[
        float | None,
        _flag("--chunk-timeout", _RUNNING, "Seconds a chunk may take before its worker counts as hung. Default: auto."),
    ] = None,
    num_actors: Annotated[int | None, _flag("--num-actors", _RUNNING, "Most models at work at once.")] = None,
    gpus_per_actor: Annotated[
        float | None, _flag("--gpus-per-actor", _RUNNING, "GPUs per model, fractions allowed.")
    ] = None,
    cpus_per_actor: Annotated[
        float | None, _flag("--cpus-per-actor", _RUNNING, "CPUs that Ray sets aside per model.")
    ] = None,
    single_writer: Annotated[
        bool | None,
        _flag("--single-writer", _RUNNING, "Accept a store without create-only writes: never run two drivers there."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.", rich_help_panel=_INPUT)] = False,
) -> None:
    """The flags of every verb that takes a job. Those that are not given are None: file or preset decides."""


def _submit_flags(
    shared_filesystem: Annotated[
        bool, _flag("--shared-filesystem", _RUNNING, "Local paths are the same on all nodes, which mount them.")
    ] = False,
    env: Annotated[
        list[str] | None,
        _flag(
            "--env",
            _RUNNING,
            "NAME of a variable to hand to the job; may be repeated. The cluster keeps it in clear text; nodes with "
            "credentials of their own for --out need none.",
        ),
    ] = None,
) -> None:
    """The flags that `submit` has beside those of a job."""


def _no_flags() -> None:
    """The flags of a verb that has no more than those of a job."""


def _takes_a_job(verb: Callable[..., None], *, more: Callable[..., None] = _no_flags) -> Callable[..., None]:
    """Give a verb the flags of `_job_flags`, which it receives as one dictionary in the words of a job file.

    The flags of `more` come as arguments of their own.
    """
    job, own = (inspect.signature(flags, eval_str=True).parameters for flags in (_job_flags, more))

    @functools.wraps(verb)
    def command(**flags: Any) -> None:
        config, as_json = flags.pop("config"), flags.pop("json")
        verb(config, {name: flags[name] for name in flags.keys() - own}, as_json, **{name: flags[name] for name in own})

    parameters = {**job, **own}
    # functions have room for a signature of one's own, which Typer reads; mypy's stubs do not know it
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill plan prompts.csv --sweep guidance_scale=3,5,7.5 --sweep seed=0:16[/bold]",
)
@_takes_a_job
def plan(config: str | None, flags: dict[str, Any], as_json: bool) -> None:
    """Say what a run would do, and write nothing."""
    from latentmill.jobs.plans.plan import draft_plan
    from latentmill.jobs.spec import resolve

    with draft_plan(resolve(config, flags)) as draft:
        summary = draft.summary()
    _answer(summary.to_dict(), as_json, lambda views: views.show_plan(summary))


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill run configs/prompts/sample.txt --out out/sample[/bold]\n\n"
    "The same command again resumes where it stopped. Exit codes: 0 complete, 1 failed samples, 2 usage, "
    "3 the output belongs to another plan, 130 interrupted.",
)
@_takes_a_job
def run(config: str | None, flags: dict[str, Any], as_json: bool) -> None:
    """Make the dataset, or go on with it: every image exactly once."""
    from dataclasses import asdict

    from latentmill.jobs.show.display import progress_view

    with progress_view() as view:
        from latentmill.jobs.runner import run_job  # the view comes first: these imports take a second
        from latentmill.jobs.spec import resolve

        stopping = "stopping; press Ctrl-C again to stop at once. Nothing that is committed is lost"
        summary = run_job(resolve(config, flags), on_progress=view.update, on_stop=lambda: view.note(stopping))
    _answer(asdict(summary), as_json, lambda views: views.show_run(summary))
    raise typer.Exit(summary.exit_code)


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: [bold]latentmill submit prompts.csv --out s3://bucket/birds --address http://head:8265[/bold]\n\n"
    "The cluster plans and runs the job by itself; submitting it again finds it, or resumes it once it has ended. The "
    "nodes need this project's Python packages, RAY_AUTH_MODE=token, and credentials for --out; a local manifest is "
    "copied there.",
)
@functools.partial(_takes_a_job, more=_submit_flags)
def submit(
    config: str | None, flags: dict[str, Any], as_json: bool, *, shared_filesystem: bool, env: list[str] | None
) -> None:
    """Hand a job to a cluster, which runs it without this machine."""
    from dataclasses import asdict

    from latentmill.jobs.spec import resolve
    from latentmill.jobs.submission.submission import submit_job

    submission = submit_job(resolve(config, flags), shared_filesystem=shared_filesystem, forwarded=env or [])
    _answer(asdict(submission), as_json, lambda views: views.show_submission(submission))


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
    address: Address = None,
    json: Json = False,
) -> None:
    """Say how far a job is, and how it fares on its cluster if it was submitted to one: exit code 1 if it failed."""
    from latentmill.jobs.submission.submission import job_status

    answer = job_status(target, deep=deep, address=address)
    _answer(answer.to_dict(), json, lambda views: views.show_job_status(answer))
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
    json: Json = False,
) -> None:
    """Read everything again and compare it with what was written; exit code 1 if anything differs."""
    from latentmill.jobs.show.display import progress_view, verify_detail

    with progress_view("reading", verify_detail) as view:
        from latentmill.jobs.outputs.verify import verify as verify_job

        report = verify_job(out, sample_n=sample, on_progress=view.update)
    _answer(report.to_dict(), json, lambda views: views.show_verify(report))
    raise typer.Exit(report.exit_code)


@app.command(rich_help_panel=_MORE, epilog="Example: [bold]latentmill clean s3://bucket/dataset --dry-run[/bold]")
def clean(
    out: OutArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be swept, and delete nothing.")] = False,
    json: Json = False,
) -> None:
    """Sweep what interrupted runs left behind: only proven garbage, safe beside a running job."""
    from latentmill.jobs.outputs.clean import clean as clean_job

    report = clean_job(out, dry_run=dry_run)
    _answer(report.to_dict(), json, lambda views: views.show_clean(report))
    raise typer.Exit(report.exit_code)


@app.command(rich_help_panel=_LOOK, epilog="Example: [bold]latentmill report out/sample --max-sheets 5[/bold]")
def report(
    out: OutArgument,
    max_sheets: Annotated[int, typer.Option("--max-sheets", min=1, help="Draw no more pages than this.")] = 20,
    json: Json = False,
) -> None:
    """Draw labelled contact sheets of a finished dataset: sweep axes as rows and columns."""
    from latentmill.jobs.show.report import report as draw_report

    summary = draw_report(out, max_sheets=max_sheets)
    _answer(summary.to_dict(), json, lambda views: views.show_report(summary))


@app.command(rich_help_panel=_MORE, epilog="Example: [bold]latentmill models[/bold]")
def models(json: Json = False) -> None:
    """List the models that --model knows by name."""
    from latentmill.jobs.models.presets import list_presets

    presets = list_presets()
    as_data = {name: preset.model_dump() for name, preset in presets.items()}
    _answer(as_data, json, lambda views: views.show_models(presets))


@watermark_app.command(epilog="Example: [bold]latentmill watermark read out/sample/images/*/*/*.png[/bold]")
def read(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Picture files or URLs.")],
    expect: Annotated[
        str, typer.Option("--expect", "--watermark-text", help="The mark to look for.")
    ] = "StableDiffusionV1",
    watermark: Annotated[
        str | None, typer.Option("--watermark", help="dwtDctSvd or dwtDct; without it, whichever fits best.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for the mark in pictures; exit code 1 if one does not carry it."""
    from latentmill.jobs.marks import read_marks

    readings = read_marks(files, text=expect, method=watermark)
    _answer([reading.to_dict() for reading in readings], json, lambda views: views.show_marks(readings))
    raise typer.Exit(0 if all(reading.found for reading in readings) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from latentmill.jobs.ledger.records import tool_versions

        sys.stdout.write(f"latentmill {tool_versions()['latentmill']}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def _answer(data: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    from latentmill.jobs.show import display, views

    if as_json:
        display.print_json(data)
    else:
        show(views)


def main() -> None:
    """The console entry: what a job refuses is one line and an exit code, never a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        _complain("interrupted; the same command resumes", 130)
    except Exception as error:
        from latentmill.engine import EngineError
        from latentmill.jobs.errors import JobError

        if not isinstance(error, JobError | EngineError):
            raise  # a mistake of ours: the traceback is what a report needs
        _complain(str(error), error.exit_code if isinstance(error, JobError) else 2)


def _complain(text: str, exit_code: int) -> None:
    from latentmill.jobs.show.display import print_line, safe

    print_line(f"error: {safe(' '.join(text.split()))}", error=True)
    sys.exit(exit_code)
