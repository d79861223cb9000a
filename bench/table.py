"""Every benchmark: what it measures, about how long it takes, and which target of the Makefile runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from bench.figures import Figure

Target = Literal["bench", "named", "bench-gpu"]
"""`bench` and `bench-gpu` are the defaults of those targets; `named` runs only by `make bench ONLY=NAME`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a benchmark is given: an empty folder of its own, and how much to do."""

    folder: Path
    device: str
    rounds: int
    tiny: bool
    """The smallest shapes that show that it works; its figures mean nothing."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """What a benchmark found."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One row of the table. `call` is `module:function` within `bench`, `arguments` what it is called with."""

    name: str
    what: str
    minutes: float
    target: Target
    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 3

    @property
    def device(self) -> str:
        return "cuda" if self.target == "bench-gpu" else "cpu"

    def measure(self, context: Context) -> Measured:
        """Run it, in this process."""
        module, _, name = self.call.partition(":")
        function: Callable[..., Measured] = getattr(import_module(f"bench.{module}"), name)
        return function(context, **self.arguments)


_CPU = (
    Benchmark(
        name="engine-embedded",
        what="embedded model, 8 pictures of 256 px: U-Net, VAE and end to end, against diffusers",
        minutes=1.5,
        target="bench",
        call="engines:compare",
        arguments={"shape": "embedded", "steps": 20},
        rounds=5,
    ),
    Benchmark(
        name="postprocess",
        what="CPU time per picture at 256, 512 and 1024 px: mark, read back, PNG, digest, all of it",
        minutes=0.5,
        target="bench",
        call="postprocessing:per_picture",
    ),
    Benchmark(
        name="job-96",
        what="whole command, 96 pictures of 256 px, 20 steps, batch 8: ours and the plain Ray Data script",
        minutes=5,
        target="bench",
        call="whole_jobs:compare",
        arguments={"pictures": 96, "peers": ["ray-data"]},
    ),
    Benchmark(
        name="job-24",
        what="whole command, 24 pictures, otherwise as job-96",
        minutes=2.5,
        target="bench",
        call="whole_jobs:compare",
        arguments={"pictures": 24, "peers": ["ray-data"]},
    ),
    Benchmark(
        name="standin-20",
        what="whole command where a batch of 8 at 512 px takes 0.36 s without CPU (an H100 at 20 steps), 256 pictures",
        minutes=3,
        target="bench",
        call="standin_jobs:compare",
        arguments={"seconds": 0.36, "pictures": 256, "peers": ["ray-data-staged"]},
    ),
    Benchmark(
        name="stores",
        what="pictures of 512 px a second to disk and to an S3 server, by an engine of no cost",
        minutes=1,
        target="bench",
        call="storing:throughput",
    ),
    Benchmark(
        name="overhead-1e4",
        what="time and driver memory of a whole job of 10,000 small pictures, by an engine of no cost",
        minutes=1,
        target="bench",
        call="overheads:whole_job",
        arguments={"samples": 10_000},
        rounds=1,
    ),
    Benchmark(
        name="start",
        what="from Enter to the first commit on Ray and inline, and what each process does meanwhile",
        minutes=1,
        target="bench",
        call="starting:timeline",
    ),
    Benchmark(
        name="job-peers",
        what="whole command, 96 pictures: all peers, with Ray Data's checkpoint, staged, and a loop in one process",
        minutes=9,
        target="named",
        call="whole_jobs:compare",
        arguments={"pictures": 96, "peers": ["ray-data", "ray-data-checkpoint", "ray-data-staged", "loop"]},
    ),
    Benchmark(
        name="job-s3",
        what="whole command, 96 pictures, to an S3 server on this machine",
        minutes=6,
        target="named",
        call="whole_jobs:compare",
        arguments={"pictures": 96, "peers": ["ray-data"], "s3": True},
    ),
    Benchmark(
        name="standin-50",
        what="as standin-20, with 0.85 s a batch (50 steps)",
        minutes=5,
        target="named",
        call="standin_jobs:compare",
        arguments={"seconds": 0.85, "pictures": 256, "peers": ["ray-data-staged"]},
    ),
    Benchmark(
        name="standin-peers",
        what="standin-20 against the plain script in one stage, and against the loop",
        minutes=9,
        target="named",
        call="standin_jobs:compare",
        arguments={"seconds": 0.36, "pictures": 256, "peers": ["ray-data-staged", "ray-data", "loop"]},
    ),
    Benchmark(
        name="faults",
        what="the same kills of workers and drivers on the checkpointed Ray Data job and on ours",
        minutes=7,
        target="named",
        call="faults:compare",
        rounds=1,
    ),
    Benchmark(
        name="engine-sd15",
        what="SD1.5's U-Net and VAE at full width with random weights, one picture of 256 px, against diffusers",
        minutes=4,
        target="named",
        call="engines:parts",
        arguments={"shape": "sd15", "side": 256, "rows": 1},
    ),
    Benchmark(
        name="overhead-1e5",
        what="as overhead-1e4, with 100,000 pictures",
        minutes=6,
        target="named",
        call="overheads:whole_job",
        arguments={"samples": 100_000},
        rounds=1,
    ),
    Benchmark(
        name="overhead-1e6",
        what="as overhead-1e4, with 1,000,000 pictures; takes about 16 GB of disk",
        minutes=15,
        target="named",
        call="overheads:whole_job",
        arguments={"samples": 1_000_000},
        rounds=1,
    ),
    Benchmark(
        name="scale",
        what="planning and resuming 1,000,000 chunks and 10,000,000 rows, publishing and verifying",
        minutes=6,
        target="named",
        call="scale:as_benchmark",
    ),
)


def _gpu(name: str, what: str, minutes: float, call: str, rounds: int = 3, **arguments: Any) -> Benchmark:
    return Benchmark(
        name=name, what=what, minutes=minutes, target="bench-gpu", call=call, arguments=arguments, rounds=rounds
    )


_GPU = (
    _gpu("gpu-matmul", "8192^3 matrix product in fp16: what this device can do", 0.5, "engines:matmul"),
    _gpu("gpu-sd15-parts", "SD1.5's U-Net and VAE, 8 pictures of 512 px", 6, "engines:parts", shape="sd15", side=512),
    _gpu("gpu-sd15-20", "SD1.5 end to end, 8 of 512 px, 20 steps", 6, "engines:compare", shape="sd15", steps=20),
    _gpu("gpu-sd15-50", "SD1.5 end to end, 8 of 512 px, 50 steps", 6, "engines:compare", shape="sd15", steps=50),
    _gpu("gpu-sd15-batches", "SD1.5 end to end, 20 steps, batches 1 to 32: ours", 5, "engines:sweep", shape="sd15"),
    _gpu("gpu-sdxl-parts", "SDXL's U-Net and VAE, 4 of 1024 px", 8, "engines:parts", shape="sdxl", side=1024, rows=4),
    _gpu(
        "gpu-sdxl-20",
        "SDXL end to end, 4 of 1024 px, 20 steps",
        8,
        "engines:compare",
        rounds=2,
        shape="sdxl",
        steps=20,
        rows=4,
        compiled=False,
    ),
    _gpu("gpu-embedded", "embedded model, 32 of 256 px", 3, "engines:compare", shape="embedded", steps=20, rows=32),
)

BENCHMARKS: Mapping[str, Benchmark] = {each.name: each for each in (*_CPU, *_GPU)}
