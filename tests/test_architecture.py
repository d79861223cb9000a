"""The import rules of the project: what each part may know of the others, and what must not slow down the command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

from latentmill.engine.families.table import FAMILIES, PIPELINES
from latentmill.engine.guards.safety import CHECKERS
from latentmill.jobs.code import code_files
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.executors import ray_private

ROOT = Path(__file__).parents[1]
STORAGE_AND_CLUSTER = {"ray", "fsspec", "s3fs", "pyarrow"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, by full name, and whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [node.module or ""]
            if node.module == "latentmill.jobs":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in lazy) for name in names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def offenders(paths: list[Path], forbidden: set[str]) -> list[str]:
    assert paths
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name, _ in imports(path)
        if any(f"{name}.".startswith(f"{module}.") for module in forbidden)
    ]


def test_the_engine_knows_nothing_of_jobs_storage_or_ray():
    assert offenders(sources("engine"), STORAGE_AND_CLUSTER | {"latentmill.jobs", "latentmill.cli"}) == []


def test_only_one_module_imports_the_optional_diffusers_and_only_when_it_runs():
    module = ROOT / "engine/diffusers_backend/pipeline.py"
    others = [path for path in [*sources("engine", "jobs"), ROOT / "cli.py"] if path != module]
    assert offenders(others, {"diffusers"}) == []
    eager = [name for name, at_import in imports(module) if at_import and name.split(".")[0] == "diffusers"]
    assert eager == []


def test_only_the_door_to_the_cluster_imports_ray_and_only_when_it_runs():
    door = [path for path in sources("jobs/executors", "jobs/submission") if path.name.startswith("ray")]
    others = [path for path in [*sources("jobs", "engine"), ROOT / "cli.py"] if path not in door]
    assert offenders(others, {"ray"}) == []
    eager = [name for path in door for name, at_import in imports(path) if at_import and name.split(".")[0] == "ray"]
    assert eager == []


def test_what_is_private_to_ray_lies_in_one_file_that_was_checked_with_the_version_in_use():
    private = re.compile(r"\bray\.(_private|_raylet|cloudpickle|rpc)\b|\b_temp_dir\b")
    paths = [*sources("engine", "jobs", "bench"), ROOT / "cli.py"]
    users = [path.name for path in paths if private.search(path.read_text(encoding="utf-8"))]
    assert users == ["ray_private.py"]
    assert version("ray") == ray_private.CHECKED_WITH


def imported_files(root: Path = ROOT) -> dict[str, set[str]]:
    """Each file of the package by module name, with those that it ever imports: for types only and lazily as well."""
    paths = [*sorted((root / "engine").rglob("*.py")), *sorted((root / "jobs").rglob("*.py")), root / "cli.py"]
    modules = {".".join(["latentmill", *path.relative_to(root).with_suffix("").parts]): path for path in paths}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    return {name: imported_modules(path, modules.keys()) for name, path in modules.items()}


def imported_modules(path: Path, modules: Collection[str]) -> set[str]:
    """Those of the modules that a file imports; `from package import module` imports the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if inner <= modules else inner | {str(node.module)}
    return found & set(modules)


def test_the_files_hold_no_circle_not_even_one_of_types(tmp_path: Path):
    TopologicalSorter(imported_files()).prepare()
    (tmp_path / "engine").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "cli.py").touch()
    (tmp_path / "jobs/one.py").write_text("from latentmill.jobs import two\n")
    (tmp_path / "jobs/two.py").write_text("if TYPE_CHECKING:\n    from latentmill.jobs.one import One\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imported_files(tmp_path)).prepare()


def test_an_executor_is_one_entry_of_the_table_and_one_file():
    for entry in EXECUTORS.values():
        module, _, name = entry.factory.partition(":")
        tree = ast.parse((ROOT / f"{module.removeprefix('latentmill.').replace('.', '/')}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_nothing_that_is_shipped_imports_the_workshop():
    shipped = [*sources("engine", "jobs"), ROOT / "cli.py"]
    assert offenders(shipped, {"training", "bench", "docs", "tests"}) == []


def test_the_benchmarks_import_nothing_of_the_tests():
    assert offenders(sources("bench"), {"tests"}) == []


def test_jobs_reach_the_engine_through_its_front_door():
    inner = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("jobs")
        for name, _ in imports(path)
        if name.startswith("latentmill.engine.") and name != "latentmill.engine.types"
    ]
    assert inner == []


def test_the_command_holds_no_logic():
    """It imports jobs, Typer and the standard library; before a verb runs, only its flags and what a refusal says."""
    names = list(imports(ROOT / "cli.py"))
    foreign = {name.split(".")[0] for name, _ in names} - set(sys.stdlib_module_names)
    assert foreign <= {"typer", "latentmill"}
    ours = {name for name, at_import in names if at_import and name.startswith("latentmill")}
    known = ("flags", "settings", "exports.spec", "scores.spec", "show.refusals")
    assert ours == {f"latentmill.jobs.{name}" for name in known}
    tree = ast.parse((ROOT / "cli.py").read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)] == []


def words(path: Path) -> Iterator[str]:
    """Every name and every whole text that a file's code mentions; documentation does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def mentions(home: str, forbidden: set[str]) -> list[str]:
    """Where a file outside the folder `home` mentions one of the words."""
    paths = [*sources("engine", "jobs"), ROOT / "cli.py"]
    others = [path for path in paths if not path.is_relative_to(ROOT / home)]
    return [f"{path.relative_to(ROOT)} mentions {word}" for path in others for word in {*words(path)} & forbidden]


def test_nothing_outside_its_own_room_branches_on_a_family():
    names = {family.name for family in FAMILIES} | set(PIPELINES)
    encoders = [encoder for family in FAMILIES for encoder in family.text_encoders]
    names |= {name for encoder in encoders for name in (type(encoder).__name__, encoder.tokenizer_class)}
    names |= {"BertTokenizer", "CLIPTokenizer", "CLIPTextModel", "CLIPTextModelWithProjection", "LdmBert"}
    assert mentions("engine/families", names) == []


def test_only_the_table_imports_a_family():
    modules = {f"latentmill.engine.families.{path.stem}" for path in sources("engine/families")}
    modules -= {f"latentmill.engine.families.{module}" for module in ("__init__", "family", "table")}
    others = [path for path in sources("engine", "jobs") if not path.is_relative_to(ROOT / "engine/families")]
    assert offenders(others, modules) == []


def test_nothing_outside_its_own_room_branches_on_a_safety_checker():
    assert mentions("engine/guards", set(CHECKERS) - {"none"}) == []
    for entry in CHECKERS.values():
        assert (ROOT / f"engine/guards/{entry.module}.py").is_file()


def test_what_is_commonly_added_takes_three_files_at_most():
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| a")]
    assert {"| a model family", "| a safety checker"} <= {row[0] for row in rows}
    for what, files, _ in rows:
        assert len(files.split(", ")) <= 3, f"{what} changes {files}"


def parts_of_jobs(root: Path = ROOT) -> dict[str, set[str]]:
    """Each folder of jobs/, each module beside them, and the command, with those of them that it ever imports."""
    found: dict[str, set[str]] = {}
    for path in [*sorted((root / "jobs").rglob("*.py")), root / "cli.py"]:
        own = path.relative_to(root / "jobs").parts[0].removesuffix(".py") if path.name != "cli.py" else "cli"
        if own == "__init__":
            continue
        names = {name.split(".")[2] for name, _ in imports(path) if name.startswith("latentmill.jobs.")}
        found.setdefault(own, set()).update(names - {own})
    return found


def floors(imported: Mapping[str, set[str]]) -> dict[str, int]:
    """On which floor each part stands, by what it imports: 0 imports none. Raises CycleError for a circle."""
    found: dict[str, int] = {}
    for part in TopologicalSorter(imported).static_order():
        found[part] = 1 + max((found[below] for below in imported[part]), default=-1)
    return found


def documented_floors() -> dict[str, int]:
    """The order that docs/architecture.md tells, lowest first."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"lowest first.*?```\n(.*?)```", page, re.DOTALL)
    return {part: floor for floor, line in enumerate(block.splitlines()) for part in line.split()}


def upward(imported: Mapping[str, set[str]], order: Mapping[str, int]) -> set[tuple[str, str]]:
    """Imports of a part that stands on the same line as the importer, or above it."""
    return {(part, other) for part, others in imported.items() for other in others if order[other] >= order[part]}


def test_no_import_runs_upward_among_the_parts_of_jobs():
    parts, order = parts_of_jobs(), documented_floors()
    assert parts.keys() == order.keys(), "docs/architecture.md must name every part of jobs/ once"
    assert upward(parts, order) == set()


def test_there_is_no_circle_among_the_parts_of_jobs():
    imported = parts_of_jobs()
    found = floors(imported)
    assert found["ledger"] < found["job"] < found["worker"] < found["executors"] < found["runner"]
    assert found["plans"] < found["ledger"]
    assert found["job"] < found["outputs"] < found["show"]
    with pytest.raises(CycleError):
        floors({**imported, "store": imported["store"] | {"job"}})


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        (
            "from latentmill import cli; cli.app(['--help'], standalone_mode=False)",
            {"torch", "ray", "pyarrow", "numpy", "pydantic"},
        ),
        ("import latentmill.engine.loading.describe", {"torch", "transformers", "cv2", "diffusers"}),
        ("import latentmill.engine", {"torch", "transformers", "ray", "pyarrow", "fsspec", "cv2"}),
        ("import latentmill.jobs.runner", {"torch", "ray", "transformers", "cv2"}),
        ("import latentmill.jobs.show.report", {"torch", "ray", "transformers", "cv2"}),
        ("import latentmill.jobs.outputs.score", {"torch", "ray", "transformers", "cv2"}),
        ("import latentmill.jobs.compare.compare", {"torch", "ray", "transformers", "cv2"}),
        ("import latentmill.jobs.exports.runners", {"torch", "ray", "transformers", "cv2", "pandas"}),
    ],
)
def test_what_an_import_must_not_bring_along(statement: str, heavy: set[str]):
    script = f"{statement}\nimport sys; print(*sorted(set(sys.modules) & {heavy!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_every_folder_with_code_is_in_the_wheel():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in sources("engine", "jobs")} | {Path(), Path("configs")}
    assert set(told) == {".".join(["latentmill", *folder.parts]) for folder in folders}


def test_every_file_of_data_is_in_the_wheel():
    """`code_files` is what goes to a cluster; a wheel has code by its packages, and other files by these patterns."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in told}
    packed = {path for package, folder in folders.items() for pattern in told[package] for path in folder.glob(pattern)}
    missing = [path for path in code_files(ROOT) if path.suffix != ".py" and path not in packed]
    assert missing == []
