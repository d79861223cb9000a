"""The flags of the verbs that take a job, made from the settings that spec.py declares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from latentmill.jobs.settings import INPUT, Setting
from latentmill.jobs.spec import SETTINGS

QUIET = "Say nothing but warnings and errors; with --json, the answer too."


class Say(NamedTuple):
    """How much a verb says, and in what form."""

    as_json: bool
    quiet: bool


def flag(name: str, panel: str, text: str) -> Any:
    """A flag as all of them look: in its panel of the help, its default in the text if it has one."""
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False)


def takes_a_job(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb a flag for each setting, which it receives as one dictionary in the words of a job file.

    It is called as `verb(config, flags, say)`, with its own keyword-only parameters as they are. A flag that is not
    given is None: job file or preset decides.
    """
    own = [
        parameter
        for parameter in inspect.signature(verb, eval_str=True).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    flags = [_parameter(name, setting) for name, setting in SETTINGS.items()]
    flags.sort(key=lambda parameter: parameter.name != "prompts")
    config = _optional("config", str, flag("--config", INPUT, "A job file; flags override it. See configs/jobs."))
    as_json = typer.Option("--json", help="Answer in JSON, for machines.", rich_help_panel=INPUT)
    quiet = typer.Option("--quiet", "-q", help=QUIET, rich_help_panel=INPUT)
    parameters = [
        flags[0],
        config,
        *flags[1:],
        *own,
        _switch("json", as_json),
        _switch("quiet", quiet),
    ]

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        mine = {parameter.name: given.pop(parameter.name) for parameter in own}
        say = Say(as_json=given.pop("json"), quiet=given.pop("quiet"))
        verb(given.pop("config"), given, say, **mine)

    # functions have room for a signature of their own, which Typer reads; mypy's stubs do not know it
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    kind = list[setting.kind] if setting.several else setting.kind  # type: ignore[name-defined]  # made at run time
    if setting.metavar:
        return _optional(name, kind, typer.Argument(metavar=setting.metavar, help=setting.help, show_default=False))
    return _optional(name, kind, flag(f"--{name.replace('_', '-')}", setting.panel, setting.help))


def _optional(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _switch(name: str, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
