"""The LoRAs of a loaded model: which of them count in a row, and the scales that its networks are given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from latentmill.engine.acceleration import upload
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.lora import Term, read_lora
from latentmill.engine.networks.lora import CONDITION, LowRank, ScaledNetwork, Switchboard, adapt
from latentmill.engine.text.lora_tags import has_lora_tags, lora_tags
from latentmill.engine.types import LORA_SCALE_LIMIT, EngineError, GenerationRequest, LoraSpec

RowScales = tuple[tuple[str, float], ...]
"""LoRAs that count in a row, by name, with their scales: none is 0."""


class Loras:
    """The LoRAs of one model by name. `reads_tags`: prompts may name them, as in A1111.

    `merged` are the scales of those that are part of the weights.
    """

    def __init__(self, specs: Sequence[LoraSpec] = (), *, reads_tags: bool = False) -> None:
        self.names = tuple(sorted(spec.name for spec in specs))
        self.merged = {spec.name: spec.merged for spec in specs if spec.merged is not None}
        self.reads_tags = reads_tags and bool(specs)
        self.switchboard = Switchboard()

    def of(self, request: GenerationRequest) -> RowScales:
        """What counts in a row: what the request says, else what its prompt's tags say, else nothing.

        Raises EngineError for a LoRA that is not loaded, and a scale outside the limits.
        """
        tags: dict[str, float] = {}
        if self.reads_tags:
            if has_lora_tags(request.negative_prompt):
                raise EngineError("the negative prompt names a LoRA; name it in the prompt, with a scale below 0")
            tags = lora_tags(request.prompt)
        scales = tags | dict(request.loras)
        for name, scale in scales.items():
            if name not in self.names:
                known = ", ".join(self.names) or "none"
                raise EngineError(f"LoRA {name[:80]!r} is not loaded; there is {known}")
            if not -LORA_SCALE_LIMIT <= scale <= LORA_SCALE_LIMIT:
                raise EngineError(
                    f"the scale of LoRA {name} is {scale}; it must be from {-LORA_SCALE_LIMIT:g} to "
                    f"{LORA_SCALE_LIMIT:g}"
                )
        for name, merged in self.merged.items():
            if scales.pop(name, 0.0) != merged:
                raise EngineError(f"LoRA {name} is part of the weights at scale {merged:g}; ask for that one")
        return tuple(sorted((name, float(scale)) for name, scale in scales.items() if scale != 0))

    def around(self, network: nn.Module) -> nn.Module:
        """The denoiser as a network that takes scales as conditions, if there are any."""
        return ScaledNetwork(network, self.switchboard) if set(self.names) - self.merged.keys() else network


def scales_of(rows: Sequence[RowScales], device: torch.device) -> dict[str, Tensor]:
    """The scales of each LoRA that counts in any of the rows, `(n,) float32`."""
    names = sorted({name for row in rows for name, _ in row})
    given = [dict(row) for row in rows]
    return {
        name: upload(torch.tensor([row.get(name, 0.0) for row in given], dtype=torch.float32), device) for name in names
    }


def as_conditions(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales as a denoiser from `Loras.around` takes them."""
    return {f"{CONDITION}{name}": tensor for name, tensor in scales.items()}


def _merge(network: nn.Module, terms: Mapping[str, Term], scale: float) -> None:
    """Add terms to the weights of a network, in float32."""
    for path, term in terms.items():
        weight = network.get_parameter(f"{path}.weight")
        whole = term.down if term.up is None else (term.up @ term.down.flatten(1)).reshape(weight.shape)
        weight.data = (weight.data.float() + scale * whole.to(weight.device)).to(weight.dtype)


def load_loras(layout: ModelLayout, networks: Mapping[str, nn.Module], loras: Loras) -> dict[str, frozenset[str]]:
    """Put each LoRA's terms beside the layers of the networks, by component, or into their weights.

    Returns the LoRAs that each component has. Raises EngineError for a key that does not fit.
    """
    beside: dict[str, dict[str, list[LowRank]]] = defaultdict(lambda: defaultdict(list))
    for name in loras.names:
        for component, terms in read_lora(layout.loras[name], layout).items():
            weight = next(networks[component].parameters())
            if name in loras.merged:
                _merge(networks[component], terms, loras.merged[name])
                continue
            for path, term in terms.items():
                up = None if term.up is None else term.up.to(weight)
                beside[component][path].append(LowRank(name, term.down.to(weight), up))
    for component, layers in beside.items():
        adapt(networks[component], layers, loras.switchboard)
    return {
        component: frozenset(term.name for terms in layers.values() for term in terms)
        for component, layers in beside.items()
    }


def merged_loras(specs: Sequence[LoraSpec]) -> str:
    """What an execution class says of LoRAs that are part of the weights; empty if none is."""
    parts = [f"{spec.name}:{spec.merged!r}" for spec in specs if spec.merged is not None]
    return f", merged {','.join(sorted(parts))}" if parts else ""
