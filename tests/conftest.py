"""What many tests share: marks by what a test uses, a real S3 server, a small model, a way to write manifests."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.models import write_tiny_model
from tests.harness.s3 import credentials, seaweedfs

# One thread a process, whatever the machine, before torch is imported: bits depend on it, and test processes side by
# side must not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_FIXTURES = {"s3_endpoint": "s3", "guarded": "cluster"}
_PROGRAMS = {"weed": "s3", "ray": "cluster", "gcs_server": "cluster"}
_running: pytest.Item | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that uses the S3 server or a cluster is marked so, by its fixtures or by a parameter of that name."""
    for item in items:
        uses = [*getattr(item, "fixturenames", ()), *getattr(getattr(item, "callspec", None), "params", {}).values()]
        for mark in {_FIXTURES.get(name, "s3" if name == "s3" else None) for name in uses if isinstance(name, str)}:
            if mark is not None:
                item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Say which test runs, for `_refuse_unmarked`."""
    global _running  # noqa: PLW0603 - an audit hook has nobody to ask
    _running = item
    try:
        return (yield)
    finally:
        _running = None


def _refuse_unmarked(event: str, arguments: tuple[Any, ...]) -> None:
    """A test that starts a store or a cluster without its mark fails: `make test-quick` must never run one."""
    if event == "subprocess.Popen" and _running is not None:
        mark = _PROGRAMS.get(Path(os.fsdecode(arguments[0])).name)
        if mark is not None and _running.get_closest_marker(mark) is None:
            raise AssertionError(f"{_running.nodeid} starts {arguments[0]}; mark it with @pytest.mark.{mark}")


sys.addaudithook(_refuse_unmarked)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS server of this session, with one bucket `test`, that checks signatures."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint: str) -> dict[str, str]:
    """The variables by which s3fs, here and in child processes, finds the server."""
    return credentials(s3_endpoint)


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh `s3://test/…` prefix on the session's server, with the credentials in the environment."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://test/{secrets.token_hex(6)}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's own cache of models; child processes inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _workers_find_the_tests() -> Iterator[None]:
    """Ray's workers import the engines of tests by name, and look nowhere near the driver for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights, f=8, 256x256 by default: small enough for 256 px in a blink."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of one prompt per line (or the given lines) and returns its path."""

    def write(prompts: int | list[str] = 4, name: str = "prompts.txt") -> Path:
        lines = [f"a red circle, number {number}" for number in range(prompts)] if isinstance(prompts, int) else prompts
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
