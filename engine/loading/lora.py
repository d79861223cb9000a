"""LoRAs from files to terms of a model's layers: each key is used, or is an error that names it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor, nn

from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.checkpoint import WeightsFile
from latentmill.engine.loading.files import shown
from latentmill.engine.loading.layout import ModelLayout, find_model
from latentmill.engine.loading.lora_files import Alphas, LoraFiles, open_lora
from latentmill.engine.loading.lora_names import Layer, Rows, layer_names, split_key
from latentmill.engine.types import EngineError, ModelSpec

RANK_LIMIT = 2048
"""Rank of a term; published ones go to a few hundred."""

_FORMS = {
    "LoRA": ({"down", "up"}, {"mid"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "LoKr": (set[str](), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
}
"""The parts that a term of each form must have, and those that it may have."""


@dataclass(frozen=True, slots=True)
class Term:
    """What a LoRA adds to a weight of shape `(o, i)` or `(o, i, k, k)`, at scale 1.

    `up (o, r)` times `down (r, ...)`; without `up`, `down` is the whole of it: LyCORIS' forms are not of low rank.
    """

    down: Tensor
    up: Tensor | None


@dataclass(frozen=True, slots=True)
class _Parts:
    """The keys of one layer's term by what they are, in one file, which calls the layer `name`."""

    file: WeightsFile
    layer: Layer
    name: str
    keys: Mapping[str, str]

    def read(self, part: str) -> Tensor:
        return self.file.read(self.keys[part]).float()

    def shape(self, part: str) -> tuple[int, ...]:
        return self.file.shapes[self.keys[part]]

    def demand(self, part: str, expected: tuple[int, ...]) -> None:
        """Raises EngineError unless the part has this shape, or is a 1x1 convolution of it."""
        if self.shape(part) not in (expected, (*expected, 1, 1)):
            raise self.fault(part, f"shape {self.shape(part)}, {self.layer.component} asks for {expected}")

    def rank(self, part: str, axis: int) -> int:
        shape = self.shape(part)
        if not -len(shape) <= axis < len(shape) or not 1 <= shape[axis] <= RANK_LIMIT:
            raise self.fault(part, f"shape {shape}; a rank is from 1 to {RANK_LIMIT}")
        return shape[axis]

    def fault(self, part: str, what: str) -> EngineError:
        return EngineError(f"{self.file.path}: {self.keys[part]} has {what}: it is not for this model")


def check_loras(spec: ModelSpec) -> None:
    """Raises EngineError, which names the key, for a LoRA of the spec that does not fit the model. Reads no weight."""
    layout = find_model(spec)
    for lora in layout.loras.values():
        _claim(lora, layout.blueprint, _skeletons(layout.blueprint))


def read_lora(lora: LoraFiles, layout: ModelLayout) -> dict[str, dict[str, Term]]:
    """For each component that the LoRA is for, its term of each layer, by path, in float32 on the CPU."""
    terms: dict[str, dict[str, Term]] = defaultdict(dict)
    blueprint = layout.blueprint
    parts, alphas = _claim(lora, blueprint, _skeletons(blueprint))
    for part in parts:
        layer = part.layer
        known = alphas.get(layer.component) or alphas.get("")
        term = _term(part, known)
        if not all(torch.isfinite(tensor).all() for tensor in (term.down, term.up) if tensor is not None):
            key = next(iter(part.keys.values()))
            raise EngineError(f"{lora.weights}: numbers of {key} are not finite; copy the file again")
        for rows in layer.rows:
            terms[layer.component][rows.path] = _of_rows(term, rows)
    return dict(terms)


def _of_rows(term: Term, rows: Rows) -> Term:
    """The term of one of the layers whose rows are one matrix in the file."""
    whole = term.down if term.up is None else term.up
    own = whole[rows.start : rows.stop]
    if rows.swapped:
        own = torch.cat(own.chunk(2)[::-1])
    return Term(own, None) if term.up is None else Term(term.down, own)


def _skeletons(blueprint: Blueprint) -> dict[str, nn.Module]:
    """The networks that a LoRA may change, without weights."""
    with torch.device("meta"):
        return {
            component: build()
            for component, build in blueprint.builders.items()
            if component != blueprint.family.autoencoder.component
        }


def _claim(
    lora: LoraFiles, blueprint: Blueprint, networks: Mapping[str, nn.Module]
) -> tuple[list[_Parts], Mapping[str, Alphas]]:
    """The parts of each layer's term, checked by their shapes. Raises EngineError unless every key is one of them."""
    file, alphas = open_lora(lora)
    names = layer_names(blueprint, networks)
    found: dict[Layer, dict[str, str]] = defaultdict(dict)
    spelled: dict[Layer, str] = {}
    unknown = []
    for key in file.shapes:
        split = split_key(key)
        layer = None if split is None else names.get(split[0])
        if split is None or layer is None:
            unknown.append(key)
        elif split[1] in found[layer]:
            raise _doubled(file, found[layer][split[1]], key)
        else:
            found[layer][split[1]] = key
            spelled[layer] = split[0]
    if unknown or not found:
        raise EngineError(
            f"LoRA {lora.name}, {file.path}: {len(unknown)} of its {len(file.shapes)} keys match nothing in the model "
            f"({blueprint.family.name}), first {shown(min(unknown, default=None))}: it was made for another one, or is "
            "of a form that is not read (LoRA, LoCon, LoHa and LoKr are)"
        )
    parts = [_Parts(file, layer, spelled[layer], keys) for layer, keys in found.items()]
    owners: dict[tuple[str, str], _Parts] = {}
    for part in parts:
        _check(part)
        for rows in part.layer.rows:
            owner = owners.setdefault((part.layer.component, rows.path), part)
            if owner is not part:
                raise _doubled(file, next(iter(owner.keys.values())), next(iter(part.keys.values())))
    return parts, alphas


def _doubled(file: WeightsFile, first: str, second: str) -> EngineError:
    return EngineError(f"{file.path} has {first} and {second}, which are of the same layer; use one")


def _check(part: _Parts) -> None:
    """Raises EngineError for a term with parts of no one form, or of shapes that do not fit its layer."""
    keys = part.keys.keys() - {"alpha"}
    form = next((name for name, (least, more) in _FORMS.items() if keys and least <= keys <= least | more), None)
    if form is None:
        raise EngineError(
            f"{part.file.path}: {shown(sorted(part.keys.values()))} is no whole LoRA, LoHa or LoKr of a layer; save it "
            "again"
        )
    if "alpha" in part.keys and part.shape("alpha") not in ((), (1,)):
        raise part.fault("alpha", f"shape {part.shape('alpha')}, not of one number")
    {"LoRA": _check_lora, "LoHa": _check_loha, "LoKr": _check_lokr}[form](part)


def _check_lora(part: _Parts) -> None:
    out, *inner = part.layer.shape
    rank = part.rank("down", 0)
    if "mid" in part.keys:
        kernel = part.layer.shape[2:]
        part.demand("down", (rank, inner[0]))
        part.demand("mid", (part.rank("mid", 0), rank, *kernel))
        part.demand("up", (out, part.rank("mid", 0)))
    else:
        part.demand("down", (rank, *inner))
        part.demand("up", (out, rank))


def _check_loha(part: _Parts) -> None:
    out, *inner = part.layer.shape
    for side in "12":
        first, second, core = f"hada_w{side}_a", f"hada_w{side}_b", f"hada_t{side}"
        rank = part.rank(second, 0)
        if core in part.keys:
            part.demand(core, (rank, rank, *part.layer.shape[2:]))
            part.demand(first, (rank, out))
            part.demand(second, (rank, inner[0]))
        else:
            part.demand(first, (out, rank))
            part.demand(second, (rank, math.prod(inner)))


def _check_lokr(part: _Parts) -> None:
    (rows, columns), left = _factor_sides(part, "lokr_w1"), _factor_sides(part, "lokr_w2")
    out, inner, *kernel = part.layer.shape
    whole = "lokr_w2" in part.keys or "lokr_t2" in part.keys
    wide = left[1] if whole else left[1] // max(1, math.prod(kernel))
    if rows * left[0] != out or columns * wide != inner:
        raise part.fault(next(iter(part.keys)), f"factors for another layer than {part.layer.shape}")
    if "lokr_w2" in part.keys:
        part.demand("lokr_w2", (left[0], wide, *kernel))
    if "lokr_t2" in part.keys:
        part.demand("lokr_t2", (part.rank("lokr_w2_a", 0), part.rank("lokr_w2_b", 0), *kernel))


def _factor_sides(part: _Parts, factor: str) -> tuple[int, int]:
    """Rows and columns of a factor of a Kronecker product, which is given whole or as two of low rank."""
    whole, pair = factor in part.keys, {f"{factor}_a", f"{factor}_b"} & part.keys.keys()
    if whole == bool(pair) or len(pair) == 1:
        raise EngineError(f"{part.file.path}: {shown(sorted(part.keys.values()))} has no whole {factor}; save it again")
    names = [factor] if whole else sorted(pair)
    if any(len(part.shape(name)) < 2 for name in names):
        raise part.fault(names[0], f"shape {part.shape(names[0])}")
    if whole:
        return part.shape(factor)[0], part.shape(factor)[1]
    if factor == "lokr_w2" and "lokr_t2" in part.keys:
        return part.shape(names[0])[1], part.shape(names[1])[1]
    if part.rank(names[0], 1) != part.rank(names[1], 0):
        raise part.fault(names[0], f"shape {part.shape(names[0])}, beside {part.shape(names[1])}")
    return part.shape(names[0])[0], part.shape(names[1])[1]


def _term(part: _Parts, alphas: Alphas | None) -> Term:
    """The term at scale 1: times alpha / rank, which both are of the file."""
    if "up" in part.keys:
        down, up = part.read("down"), part.read("up").flatten(1)
        scale = _scale(part, alphas, down.shape[0])
        if "mid" in part.keys:
            down = einsum(part.read("mid"), down.flatten(1), "o r h w, r i -> o i h w")
        return Term(down.reshape(-1, *part.layer.shape[1:]), up * scale)
    whole = _hadamard(part) if "hada_w1_a" in part.keys else _kronecker(part)
    ranks = [part.rank(name, 0) for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in part.keys]
    return Term(whole.reshape(part.layer.shape) * (_scale(part, alphas, ranks[0]) if ranks else 1.0), None)


def _scale(part: _Parts, alphas: Alphas | None, rank: int) -> float:
    alpha = float(part.read("alpha")) if "alpha" in part.keys else None
    root = False
    if alpha is None and alphas is not None:
        alpha, root = alphas.of(part.name), alphas.root
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)


def _hadamard(part: _Parts) -> Tensor:
    """Two terms of low rank, multiplied entry by entry (arXiv:2108.06098, eq. 2; with a core, its section 2.3)."""
    first, second = (_factor(part, f"hada_w{side}", f"hada_t{side}", part.layer.shape) for side in "12")
    return first * second


def _kronecker(part: _Parts) -> Tensor:
    """A Kronecker product, of which each factor may be of low rank (arXiv:2309.14859, section 3.2)."""
    kernel = part.layer.shape[2:]
    rows, columns = _factor_sides(part, "lokr_w1")
    left = part.read("lokr_w1") if "lokr_w1" in part.keys else part.read("lokr_w1_a") @ part.read("lokr_w1_b")
    shape = (part.layer.shape[0] // rows, part.layer.shape[1] // columns, *kernel)
    right = part.read("lokr_w2") if "lokr_w2" in part.keys else _factor(part, "lokr_w2", "lokr_t2", shape)
    return torch.kron(left.reshape(rows, columns, *[1] * len(kernel)), right.reshape(shape).contiguous())


def _factor(part: _Parts, name: str, core: str, shape: tuple[int, ...]) -> Tensor:
    """A weight from its two factors, or from three by Tucker's decomposition."""
    first, second = part.read(f"{name}_a"), part.read(f"{name}_b")
    if core not in part.keys:
        return (first @ second).reshape(shape)
    return einsum(part.read(core), first, second, "a b h w, a o, b i -> o i h w")
