"""The fault proxy as a process: start it, ask it for its report, end it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tests.soak.fault_proxy import REPORT, Faults


@contextmanager
def fault_proxy(upstream: str, faults: Faults, seed: int) -> Iterator[str]:
    """The address of a proxy that ends with the block."""
    command = [sys.executable, "-m", "tests.soak.fault_proxy", "--upstream", upstream]
    command += ["--seed", str(seed), "--faults", json.dumps(asdict(faults))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def proxy_report(address: str) -> dict[str, Any]:
    """Requests by method, faults by kind, attempts by output."""
    with urllib.request.urlopen(address + REPORT, timeout=10) as answer:
        report: dict[str, Any] = json.load(answer)
    return report
