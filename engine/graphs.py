"""A network as CUDA graphs: the kernels of eager mode and their bits, launched all at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from latentmill.engine.networks.attention import KeysValues

_LIMIT = 8
"""Graphs kept at a time: one for each shape of a batch, context and guidance. The oldest goes first."""


class _Graph:
    """One captured call. Its inputs are copied to where the graph reads them, but not those that it has already."""

    def __init__(self, call: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]) -> None:
        self._read = [tensor.clone() for tensor in inputs]
        self._copied = list(inputs)
        self._graph = torch.cuda.CUDAGraph()
        cuda: Any = torch.cuda  # its Stream has no types
        current, aside = cuda.current_stream(), cuda.Stream()
        aside.wait_stream(current)
        with cuda.stream(aside):
            call(self._read)  # libraries allocate and choose kernels in a first call, which a graph must not hold
        current.wait_stream(aside)
        # Another thread may use the device meanwhile: the safety checker does.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = call(self._read)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for number, (place, tensor) in enumerate(zip(self._read, inputs, strict=True)):
            # By identity, not by value: what is held here cannot have been freed and its memory used again.
            if self._copied[number] is not tensor:
                place.copy_(tensor)
                self._copied[number] = tensor
        self._graph.replay()
        # The next replay writes where this one did, and samplers keep earlier predictions.
        return self._output.clone()


class CapturedNetwork:
    """Called as the network is. Inputs must not be changed in place between two calls."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._graphs: dict[Hashable, _Graph] = {}
        self._context: Tensor | None = None
        self._weights: list[int] = []

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        projected: Sequence[KeysValues] = (),
        **conditions: Tensor,
    ) -> Tensor:
        if context is not self._context:
            self._forget_moved_weights()
            self._context = context
        names, pairs = list(conditions), len(projected)

        def call(given: Sequence[Tensor]) -> Tensor:
            flat = given[3 : 3 + 2 * pairs]
            named = dict[str, Any](zip(names, given[3 + 2 * pairs :], strict=True))
            if pairs:
                named["projected"] = list(zip(flat[::2], flat[1::2], strict=True))
            output: Tensor = self._network(*given[:3], **named)
            return output

        inputs = [latents, timesteps, context, *chain.from_iterable(projected), *conditions.values()]
        key = (*names, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs))
        with torch.cuda.device(latents.device):
            if key not in self._graphs:
                if len(self._graphs) >= _LIMIT:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = _Graph(call, inputs)
            return self._graphs[key].replay(inputs)

    def _forget_moved_weights(self) -> None:
        """A retry in full precision puts the weights elsewhere, where no graph looks for them. Once a batch."""
        places = [parameter.data_ptr() for parameter in self._network.parameters()]
        if places != self._weights:
            self._graphs.clear()
            self._weights = places
