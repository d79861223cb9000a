"""What a figure was measured on, and how much time and memory a piece of work took."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_PACKAGES = (
    "pyarrow",
    "numpy",
    "fsspec",
    "s3fs",
    "ray",
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "invisible-watermark",
    "Pillow",
)


def describe_machine() -> dict[str, Any]:
    """Cores that this process may use and how busy they are, memory, load and the versions of what is installed."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "cores_busy": round(_cores_busy(), 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **_versions(),
    }


def _cores_busy(seconds: float = 1.0) -> float:
    """How many cores others use at this moment: the load of a minute would still know the benchmark before."""

    def idle_and_all() -> tuple[int, int]:
        ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    idle, total = idle_and_all()
    time.sleep(seconds)
    idle_now, total_now = idle_and_all()
    return (os.cpu_count() or 1) * (1 - (idle_now - idle) / max(1, total_now - total))


def describe_gpu() -> str | None:
    """The CUDA device that torch sees, with the versions that its speed depends on."""
    import torch

    if not torch.cuda.is_available():
        return None
    cudnn: Any = torch.backends.cudnn
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn.version()}"


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; `BENCH_COMMIT` for a copy without its git."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!bench/*.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def keep_cores(number: int) -> None:
    """Afterwards this process and its children run on at most so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def peak_mib() -> float:
    """The most memory that this process has ever held, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; the benchmarks need Linux")


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what happens within to the named seconds."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
