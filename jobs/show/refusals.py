"""What the command says when it refuses: one line and an exit code, and JSON beside it where that is asked for."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

_click_errors: Any = sys.modules[typer.BadParameter.__module__]
"""Click's exceptions, which Typer brings under a name of its own."""


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command and exit; what a job refuses is one line and an exit code, never a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        _complain("interrupted; the same command resumes", 130)
    except _click_errors.ClickException as error:
        _refuse_usage(error)
    except Exception as error:  # which are expected is known by packages that a good start need not import
        from latentmill.engine import EngineError
        from latentmill.jobs.errors import JobError

        if not isinstance(error, JobError | EngineError):
            raise  # a mistake of ours: the traceback is what a report needs
        _complain(str(error), error.exit_code if isinstance(error, JobError) else 2)


def _refuse_usage(error: Any) -> NoReturn:
    """Usage that Click refuses, with the flag that was meant where the table of aliases knows it."""
    from typer.rich_utils import rich_format_error

    from latentmill.jobs.show.events import tell_error

    if isinstance(error, _click_errors.NoSuchOption) and error.ctx is not None:
        _say_what_was_meant(error)
    if not tell_error(error.format_message(), error.exit_code):
        rich_format_error(error)
    _print_json_error(error.format_message(), error.exit_code)
    sys.exit(error.exit_code)


def _say_what_was_meant(error: Any) -> None:
    verb, flags = error.ctx.info_name, {flag for parameter in error.ctx.command.params for flag in parameter.opts}
    if error.option_name == "--dry-run" and verb in {"run", "submit"}:
        error.message = (
            f"{verb} has no --dry-run: `latentmill plan` takes the same flags, says what a run would do, and "
            "writes nothing."
        )
        error.possibilities = None
        return
    from latentmill.jobs.manifests.aliases import flag_meant_by
    from latentmill.jobs.spec import REMOVED

    remedy = REMOVED.get(error.option_name.lstrip("-").replace("-", "_"))
    if remedy is not None and "--config" in flags:
        error.message, error.possibilities = f"No such option: {error.option_name}; {remedy}", None
        return
    meant = flag_meant_by(error.option_name)
    if meant in flags:
        error.possibilities = [meant]


def _complain(text: str, exit_code: int) -> NoReturn:
    from latentmill.jobs.show.display import safe
    from latentmill.jobs.show.events import tell_error
    from latentmill.jobs.terminal import print_line

    line = " ".join(text.split())
    if not tell_error(line, exit_code):
        print_line(f"error: {safe(line)}", error=True)
    _print_json_error(line, exit_code)
    sys.exit(exit_code)


def _print_json_error(text: str, exit_code: int) -> None:
    """With --json, so that standard output is not empty."""
    if "--json" in sys.argv[2:] and sys.argv[1] != "txt2img":  # its --prompt may be any text
        from latentmill.jobs.show.display import print_json

        print_json({"error": text, "exit_code": exit_code})
