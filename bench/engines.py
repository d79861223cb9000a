"""The engine against diffusers on the same weights: U-Net and VAE alone, and from prompts to pixels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.figures import figure, interleaved, ratio
from bench.machine import ROOT
from bench.parts import decode_by, unet_of
from bench.peers.engines import COMPILE_MODE, Diffusers
from bench.pictures import differences, say
from bench.shapes import EMBEDDED, SHAPES, folder_of
from bench.table import Context, Measured
from latentmill.engine import Engine, GenerationRequest, ModelSpec

GUIDANCE = 4.0
ROWS = 8


class Bench:
    """One model in our engine and in diffusers, on one device; on a CPU, one thread each."""

    def __init__(self, context: Context, shape: str, rows: int, *, compiled: bool) -> None:
        self.cuda = context.device == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit(f"device is cuda, but torch {torch.__version__} sees none")
        torch.set_num_threads(1)
        self.context, self.shape, self.rows = context, shape, rows
        self.folder = folder_of(shape, context.folder / shape, torch.float16, narrow=context.tiny)
        self.engine = load_ours(self.folder, context.device, rows)
        self.held = torch.cuda.memory_allocated() if self.cuda else 0  # by the model, before there is another one
        precision = f"fp16; diffusers compiled: torch.compile mode {COMPILE_MODE}, channels last"
        self.measured = Measured(notes=[precision if self.cuda else "fp32, one thread, seconds of CPU time"])
        self.peers: dict[str, Diffusers] = {}
        if find_spec("diffusers") is None:
            self.measured.notes.append("diffusers is not installed here: ours alone is measured")
            return
        self.peers["diffusers batched"] = Diffusers(self.folder, context.device)
        if self.cuda and compiled:
            self.peers["diffusers compiled"] = Diffusers(self.folder, context.device, compiled=True)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of CPU time on a CPU, where others may be at work too; on a GPU, until it is done."""
        if not self.cuda:
            began = time.process_time()
            work()
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak(self, requests: Sequence[GenerationRequest]) -> float:
        """The most GPU memory that our model takes while it draws, in GiB, whatever else is loaded."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.engine.generate(requests)
        return (self.held + torch.cuda.max_memory_allocated() - before) / 2**30

    def compare(
        self, part: str, contenders: Mapping[str, Callable[[], Any]], *, repeat: int = 1
    ) -> dict[str, list[float]]:
        """Time contenders, the first of which is ours, after one run of each that does not count."""
        working = {name: work for name, work in contenders.items() if self._warmed_up(part, name, work)}

        def timed(work: Callable[[], Any]) -> Callable[[], float]:
            return lambda: self.seconds(lambda: [work() for _ in range(repeat)]) / repeat

        found = interleaved({name: timed(work) for name, work in working.items()}, self.context.rounds)
        for name, values in found.items():
            self.measured.figures.append(figure(f"{part}: {name}", "s", values))
        for name in [name for name in found if name != "ours"]:
            self.measured.figures.append(ratio(f"{part}: {name} / ours", found[name], found["ours"]))
        return found

    def _warmed_up(self, part: str, name: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception as error:  # a compiler may raise anything
            if not name.endswith("compiled"):
                raise
            # A compiler that refuses a model is a finding about it, and must not cost the other figures.
            self.measured.notes.append(f"{part}: {name} does not run: {type(error).__name__}: {str(error)[:200]}")
            return False
        return True


def load_ours(folder: Path, device: str, rows: int, execution: str = "eager") -> Engine:
    """Our engine without a checker, at the precision of the device."""
    dtype = "float16" if device == "cuda" else "float32"
    spec = ModelSpec(model=str(folder), safety="none")
    return Engine.load(spec, device=device, dtype=dtype, batch_size=rows, execution=execution)


def compare(context: Context, shape: str, steps: int, rows: int = ROWS, *, compiled: bool = True) -> Measured:
    """From prompts to pixels; on a CPU, where it is cheap, U-Net and VAE too.

    On a GPU also as graphs, and by the compiler unless it would take many minutes.
    """
    rows = 2 if context.tiny else rows
    steps = 2 if context.tiny else steps
    bench = Bench(context, shape, rows, compiled=compiled)
    side = _side(context, shape)
    lines = (ROOT / "configs/prompts/sample.txt").read_text().splitlines()
    prompts = [lines[number % len(lines)] for number in range(rows)]
    requests = [
        GenerationRequest(
            prompt=prompt, seed=seed, width=side, height=side, num_inference_steps=steps, guidance_scale=GUIDANCE
        )
        for seed, prompt in enumerate(prompts)
    ]
    options = {"width": side, "height": side, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
    pictures: dict[str, list[Any]] = {}

    def ours(name: str, engine: Engine) -> Callable[[], None]:
        return lambda: pictures.update({name: [result.pixels for result in engine.generate(requests)]})

    def peer(name: str) -> Callable[[], None]:
        return lambda: pictures.update({name: bench.peers[name].draw(prompts, range(rows), **options)})

    def one_by_one() -> None:
        drawn = [bench.peers["diffusers batched"].draw([prompts[n]], [n], **options)[0] for n in range(rows)]
        pictures["diffusers one by one"] = drawn

    if bench.cuda:
        bench.measured.figures.append(figure("ours: peak memory", "GiB", [bench.peak(requests)]))
    engines = {"ours": bench.engine}
    for execution in ("graphs", "compiled") if bench.cuda and compiled else ("graphs",) if bench.cuda else ():
        engines[f"ours, {execution}"] = load_ours(bench.folder, context.device, rows, execution)
    contenders = {name: ours(name, engine) for name, engine in engines.items()}
    contenders |= {name: peer(name) for name in bench.peers}
    if bench.peers and not bench.cuda:
        contenders["diffusers one by one"] = one_by_one
    found = bench.compare("end to end", contenders)
    if {"ours, compiled", "diffusers compiled"} <= set(found):
        likes = ratio("end to end: compiled, diffusers / ours", found["diffusers compiled"], found["ours, compiled"])
        bench.measured.figures.append(likes)
    for name in [name for name in engines if name in found]:
        bench.measured.figures.append(figure(name, "pictures/s", [rows / seconds for seconds in found[name]]))
    if shape == "embedded":
        bench.measured.notes += [
            say(f"pictures of ours and of {name}", differences(pictures["ours"], drawn))
            for name, drawn in pictures.items()
            if name != "ours"
        ]
    else:
        bench.measured.notes.append("random weights: pictures are noise; the networks' outputs are compared by parts")
    if not bench.cuda:
        _parts(bench, side, rows)
    return bench.measured


def parts(context: Context, shape: str, side: int, rows: int = ROWS) -> Measured:
    """U-Net and VAE alone."""
    bench = Bench(context, shape, 2 if context.tiny else rows, compiled=True)
    _parts(bench, _side(context, shape) if context.tiny else side, bench.rows)
    return bench.measured


def sweep(context: Context, shape: str) -> Measured:
    """Our pictures a second by batch size."""
    torch.set_num_threads(1)
    folder = folder_of(shape, context.folder / shape, torch.float16, narrow=context.tiny)
    side, steps = _side(context, shape), 2 if context.tiny else 20
    measured = Measured()
    for rows in (1, 2) if context.tiny else (1, 2, 4, 8, 16, 32):
        engine = load_ours(folder, context.device, rows)
        request = GenerationRequest(prompt="a red circle", width=side, height=side, num_inference_steps=steps)
        engine.generate([request] * rows)
        seconds = []
        for _ in range(context.rounds):
            began = time.perf_counter()
            engine.generate([request] * rows)
            seconds.append(time.perf_counter() - began)
        measured.figures.append(figure(f"batch {rows}", "pictures/s", [rows / each for each in seconds]))
    return measured


def matmul(context: Context) -> Measured:
    """What the device can do, by its own libraries."""
    size = 256 if context.tiny else 8192
    dtype = torch.float16 if context.device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=context.device) for _ in range(2))
    seconds = []
    for number in range(12):
        if context.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        if context.device == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            seconds.append(time.perf_counter() - began)
    return Measured(figures=[figure("matrix product", "TFLOP/s", [2 * size**3 / each / 1e12 for each in seconds])])


def _side(context: Context, shape: str) -> int:
    if shape == "embedded":
        return 256
    return 64 if context.tiny else SHAPES[shape].side


def _parts(bench: Bench, side: int, rows: int) -> None:
    """One guided step's forward, of twice the rows, and the decoding of all rows."""
    unet = unet_of(bench.engine)
    config, vae = (json.loads((bench.folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    device, dtype = bench.context.device, next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    latents = random(2 * rows, config["in_channels"], side // factor, side // factor)
    timesteps = torch.full((2 * rows,), 500, device=device)
    context = random(2 * rows, 77, config["cross_attention_dim"])
    extra = None
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        extra = {"pooled": random(2 * rows, pooled), "time_ids": torch.full((2 * rows, 6), float(side), device=device)}

    @torch.inference_mode()
    def ours() -> Tensor:
        found: Tensor = unet(latents, timesteps, context, **(extra or {}))
        return found

    @torch.inference_mode()
    def our_decode() -> Tensor:
        return decode_by(bench.engine, latents[:rows].to(vae_dtype))

    vae_dtype = torch.float32 if not bench.cuda or vae["force_upcast"] else dtype
    peers = {
        name: (lambda peer=peer: peer.denoise(latents, timesteps, context, extra)) for name, peer in bench.peers.items()
    }
    repeat = 1 if bench.context.tiny or bench.folder != EMBEDDED else 4
    bench.compare("U-Net", {"ours": ours, **peers}, repeat=repeat)
    decoders = {name: (lambda peer=peer: peer.decode(latents[:rows])) for name, peer in bench.peers.items()}
    bench.compare("VAE", {"ours": our_decode, **decoders})
    for part, own, peer in (("U-Net", ours, peers), ("VAE", our_decode, decoders)) if peers else ():
        expected = peer["diffusers batched"]().float()
        apart = (own().float() - expected).abs().max() / expected.abs().max()
        bench.measured.notes.append(
            f"{part}: greatest difference to diffusers {float(apart):.2g} of its greatest value"
        )
