"""The generated parts of the documentation, made from the code: `python docs/generate.py` writes them again.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. A test holds each page to what this would write.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmill.engine.families.table import FAMILIES
from latentmill.engine.sampling.table import SAMPLER_TABLE
from latentmill.jobs.executors.metrics import METRICS
from latentmill.jobs.executors.ray_metrics import EXPORTED_PREFIX
from latentmill.jobs.exports.spec import EXPORT_SETTINGS, ExportSpec
from latentmill.jobs.exports.table import EXPORTS, IMAGE_FORMATS
from latentmill.jobs.manifests.aliases import ALIASES
from latentmill.jobs.manifests.fields import AXES, FIELDS
from latentmill.jobs.manifests.formats import FORMATS, formats_of
from latentmill.jobs.models.presets import list_presets
from latentmill.jobs.plans.columns import COLUMNS
from latentmill.jobs.scores.spec import SCORE_SETTINGS, ScoreSpec
from latentmill.jobs.scores.table import SCORERS
from latentmill.jobs.settings import Setting
from latentmill.jobs.show.events import EVENTS
from latentmill.jobs.spec import SETTINGS, JobSpec, Runtime
from latentmill.jobs.stages import STAGES
from latentmill.jobs.txt2img.options import build_parser

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SOURCES = ("engine", "jobs", "docs", "training", "bench")

_PART = re.compile(r"(?P<begin><!-- generated: (?P<name>[a-z]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_KINDS = {bool: "switch", int: "whole number", float: "number", str: "text"}


def modules() -> str:
    """Every module with the first line of its docstring, folder by folder."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in (*ROOT.glob("*.py"), *(path for top in SOURCES for path in (ROOT / top).rglob("*.py"))):
        folders[path.parent.relative_to(ROOT)].append(path)
    lines = ["```"]
    for folder, paths in sorted(folders.items(), key=lambda item: _reading_order(item[0])):
        named = {path.name: _first_line(path) for path in sorted(paths)}
        about = named.pop("__init__.py", "")
        lines.append(f"{'latentmill' if folder == Path() else folder}/".ljust(34) + about)
        lines += [f"  {name:<32}{text}" for name, text in named.items()]
    return "\n".join(line.rstrip() for line in [*lines, "```"])


def settings() -> str:
    """Every setting, by panel of the help: how it is written, what it takes, and whether it is part of the plan."""
    defaults = {field.name: field.default for spec in (JobSpec, Runtime) for field in dataclasses.fields(spec)}
    panels: dict[str, list[Sequence[str]]] = defaultdict(list)
    for name, setting in SETTINGS.items():
        flag = setting.metavar or f"--{name.replace('_', '-')}"
        default = _default(defaults[name])
        help_text = setting.help.removesuffix(f" Default: {defaults[name]}.")
        row = (f"`{flag}`", _kind(setting), setting.allowed, default, "yes" if setting.planned else "", help_text)
        panels[setting.panel].append(row)
    head = ("flag", "type", "allowed", "default", "planned", "what it does")
    return "\n\n".join(f"### {panel}\n\n{_table(head, rows)}" for panel, rows in panels.items())


def exports() -> str:
    """The forms of exports, and a line that loads each."""
    rows = [(f"`{name}`", entry.what, f"`{entry.loader}`") for name, entry in EXPORTS.items()]
    return _table(("`--to`", "what is written", "how it is loaded"), rows)


def pictures() -> str:
    """The forms of pictures in exports."""
    rows = [(f"`{name}`", entry.what, entry.quality) for name, entry in IMAGE_FORMATS.items()]
    return _table(("`--image-format`", "what a picture is", "`--image-quality`"), rows)


def exporting() -> str:
    """Every setting of an export."""
    defaults = {field.name: field.default for field in dataclasses.fields(ExportSpec)}
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            _kind(setting),
            _default(defaults[name]),
            "yes" if setting.planned else "",
            setting.help.removesuffix(f" Default: {defaults[name]}."),
        )
        for name, setting in EXPORT_SETTINGS.items()
    ]
    return _table(("flag", "type", "default", "planned", "what it does"), rows)


def scorers() -> str:
    """The scorers that the project has itself."""
    return _table(("`--with`", "columns"), [(f"`{name}`", entry.what) for name, entry in SCORERS.items()])


def scoring() -> str:
    """Every setting of `latentmill score`."""
    defaults = {field.name: field.default for field in dataclasses.fields(ScoreSpec)}
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            _kind(setting),
            setting.allowed,
            _default(defaults[name]),
            setting.help.removesuffix(f" Default: {defaults[name]}."),
        )
        for name, setting in SCORE_SETTINGS.items()
    ]
    return _table(("flag", "type", "allowed", "default", "what it does"), rows)


def metrics() -> str:
    """What Prometheus may know of a run."""
    rows = [
        (f"`{EXPORTED_PREFIX}{name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.what)
        for name, metric in METRICS.items()
    ]
    return _table(("metric", "kind", "labels", "what it says"), rows)


def formats() -> str:
    """The formats of manifests."""
    rows = []
    for name, format_ in FORMATS.items():
        file = ", ".join(f"`.{suffix}`" for suffix in format_.suffixes)
        chosen = any(formats_of(suffix)[0] != name for suffix in format_.suffixes)
        option = f" with `--manifest-format {name}`" if chosen else ""
        rows.append((file + option, format_.row, "yes" if format_.gzip else ""))
    return _table(("file", "what a row is", "also `.gz`"), rows)


def parameters() -> str:
    """The manifest's own columns, their limits, and other programs' names for them."""
    others = defaultdict(list)
    for alias, name in ALIASES.items():
        others[name].append(f"`{alias}`")
    rows = [
        (f"`{name}`", field.allowed, "yes" if name in AXES else "", ", ".join(others[name]))
        for name, field in FIELDS.items()
    ]
    return _table(("column", "allowed", "sweep axis", "read with `--accept-aliases`"), rows)


def columns() -> str:
    """The columns of a published row."""
    return _table(
        ("column", "type", "from", "what it says", "what `verify` demands"),
        [(f"`{column.name}`", str(column.type), column.source, column.text, column.demand) for column in COLUMNS],
    )


def samplers() -> str:
    """The table of samplers."""
    rows = [
        (
            f"`{name}`",
            sampler.label,
            sampler.solver,
            sampler.levels,
            "by `--eta`" if sampler.takes_eta else "each step" if sampler.stochastic else "",
            "yes" if sampler.flow is not None else "",
        )
        for name, sampler in SAMPLER_TABLE.items()
    ]
    return _table(("sampler", "name in web UIs", "solver", "levels", "adds noise", "flow matching"), rows)


def presets() -> str:
    """The presets of configs/models."""
    rows = [
        (
            f"`{name}`",
            preset.description,
            f"{preset.sampler}, {preset.num_inference_steps} steps, guidance {preset.guidance_scale:g}",
            preset.license or "",
        )
        for name, preset in list_presets().items()
    ]
    return _table(("preset", "what it is", "defaults", "license of the weights"), rows)


def families() -> str:
    """The files of each family: its own, what it shares with others, and the networks that it builds."""
    rows = []
    for family in FAMILIES:
        own = next(path for path in _room("families") if _module(path).get("FAMILY") is family)
        shared = [path for path in _imported(own.read_text(encoding="utf-8"), "families") if path.stem != "family"]
        builders: list[Callable[..., Any]] = [family.denoiser.build, family.autoencoder.build]
        builders += [part.build for part in family.text_encoders]
        sources = (textwrap.dedent(inspect.getsource(build)) for build in builders)
        networks = {path for source in sources for path in _imported(source, "networks")}
        cells = (", ".join(f"`{path.name}`" for path in sorted(paths)) for paths in ([own], shared, networks))
        rows.append((f"`{family.name}`", *cells))
    return _table(("family", "its own file", "parts shared with others", "its networks"), rows)


def stages() -> str:
    """The stages that a chunk goes through."""
    return _table(("stage", "what it is"), [(f"`{name}`", text) for name, text in STAGES.items()])


def events() -> str:
    """What `--log-json` tells, with the keys of each event."""
    rows = [
        (f"`{event}`", "; ".join(f"`{name}`: {text}" for name, text in keys.items())) for event, keys in EVENTS.items()
    ]
    return _table(("`event`", "keys beside `time` and `event`"), rows)


def differences() -> str:
    """Where `txt2img` differs from the original script: the list that its help ends with."""
    ending = build_parser("latentmill txt2img").epilog or ""
    return textwrap.dedent(ending.partition("\n")[2].partition("\n\n")[0])


PARTS: Mapping[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        modules,
        settings,
        formats,
        parameters,
        columns,
        samplers,
        presets,
        families,
        differences,
        exports,
        pictures,
        exporting,
        scorers,
        scoring,
        metrics,
        stages,
        events,
    )
}


def regenerated(text: str) -> str:
    """The page with its generated parts as they should be."""
    return _PART.sub(lambda found: f"{found['begin']}{PARTS[found['name']]()}\n{found['end']}", text)


def main() -> None:
    """Write every page whose generated parts have changed."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(regenerated(text), encoding="utf-8")


def _room(name: str) -> list[Path]:
    return sorted((ROOT / "engine" / name).glob("*.py"))


def _module(path: Path) -> Mapping[str, Any]:
    return vars(importlib.import_module(f"latentmill.engine.{path.parent.name}.{path.stem}"))


def _imported(source: str, room: str) -> list[Path]:
    """The files of one of the engine's rooms that some code imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    return [path for path in _room(room) if any(f"engine.{room}.{path.stem}." in f"{name}." for name in names)]


def _reading_order(folder: Path) -> tuple[int, Path]:
    """The root first, then the trees in the order of SOURCES."""
    return (SOURCES.index(folder.parts[0]) if folder.parts else -1, folder)


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def _kind(setting: Setting) -> str:
    return ("several: " if setting.several else "") + _KINDS[setting.kind]


def _default(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


if __name__ == "__main__":
    main()
