"""What many tests share: a real S3 server, a small random model, and a way to write a manifest."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import write_tiny_model
from tests.seaweedfs import credentials, seaweedfs


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
