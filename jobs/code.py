"""Which code runs: the files of the package, and the digest by which a driver and its workers know that they match.

`installed_code` also runs where another version of the package is installed, or none: it uses nothing but Python's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path

_PARTS = ("__init__.py", "__main__.py", "cli.py", "engine", "jobs", "configs")
_LEFT_OUT = {"__pycache__", ".mypy_cache"}


@dataclass(frozen=True, kw_only=True)
class Code:
    """One state of the package's source. The version is for people; two that differ in the digest are not the same."""

    version: str
    digest: str
    place: str

    def __str__(self) -> str:
        return f"latentmill {self.version} (code {self.digest})"


@lru_cache(maxsize=1)
def own_code() -> Code:
    """The code that this process runs, as it was on disk when it was first asked for."""
    return read_code(package_root())


def package_root() -> Path:
    """The folder of the package that runs here."""
    return Path(__file__).parents[1]


def code_files(root: Path) -> Iterator[Path]:
    """Every file of the package in that folder; tests, the training recipe and benchmarks beside it are not of it."""
    for name in _PARTS:
        place = root / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        yield from (path for path in files if path.is_file() and not _LEFT_OUT.intersection(path.parts))


def read_code(root: Path) -> Code:
    """The code in that folder. Its version is that of whatever is installed under the package's name."""
    digest = hashlib.sha256()
    for path in code_files(root):
        if path.suffix == ".py":
            data = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    return Code(version=version_of("latentmill"), digest=digest.hexdigest()[:16], place=str(root))


def version_of(package: str) -> str:
    """The version of an installed package; `unknown` if it is not installed, as our own in a bare checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def installed_code() -> Code | None:
    """The code that `import latentmill` would find, without importing any of it."""
    found = util.find_spec("latentmill")
    if found is None:
        return None
    folders = list(found.submodule_search_locations or [])
    return read_code(Path(folders[0]) if folders else Path(found.origin or "").parent)
