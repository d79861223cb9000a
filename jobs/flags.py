"""The flags of verbs, made from the settings that are declared for them: a job's in spec.py, others in their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
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
    """Give a verb a flag for each setting of a job, which it receives as one dictionary in the words of a job file.

    It is called as `verb(config, flags, say)`, with its own keyword-only parameters as they are. A flag that is not
    given is None: job file or preset decides.
    """
    flags = [_parameter(name, setting) for name, setting in SETTINGS.items()]
    flags.sort(key=lambda parameter: parameter.name != "prompts")
    config = _optional("config", str, flag("--config", INPUT, "A job file; flags override it. See configs/jobs."))

    def called(given: dict[str, Any], say: Say, mine: dict[str, Any]) -> None:
        verb(given.pop("config"), given, say, **mine)

    return _command(verb, [flags[0], config, *flags[1:], *_own(verb)], INPUT, called)


def takes_settings(settings: Mapping[str, Setting], panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb a flag for each of these settings, which it receives as one dictionary; None is not given.

    It is called as `verb(flags, say)`, with its own keyword-only parameters, which come first, as they are. What it
    says is asked for in the panel of that name.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def called(given: dict[str, Any], say: Say, mine: dict[str, Any]) -> None:
            verb(given, say, **mine)

        flags = [_parameter(name, setting) for name, setting in settings.items()]
        return _command(verb, [*_own(verb), *flags], panel, called)

    return decorate


def _own(verb: Callable[..., None]) -> list[inspect.Parameter]:
    parameters = inspect.signature(verb, eval_str=True).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _command(
    verb: Callable[..., None],
    parameters: list[inspect.Parameter],
    panel: str,
    called: Callable[[dict[str, Any], Say, dict[str, Any]], None],
) -> Callable[..., None]:
    """What Typer reads in place of the verb: these parameters, and how much is said."""
    as_json = typer.Option("--json", help="Answer in JSON, for machines.", rich_help_panel=panel)
    quiet = typer.Option("--quiet", "-q", help=QUIET, rich_help_panel=panel)
    parameters = [*parameters, _switch("json", as_json), _switch("quiet", quiet)]
    own = [parameter.name for parameter in _own(verb)]

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        mine = {name: given.pop(name) for name in own}
        say = Say(as_json=given.pop("json"), quiet=given.pop("quiet"))
        called(given, say, mine)

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
