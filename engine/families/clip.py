"""CLIP as a text encoder, by OpenAI or OpenCLIP, with or without its projection: shared by several families."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latentmill.engine.families.family import Origin, Shapes, TextEncoderSpec, count, unnamed
from latentmill.engine.loading.clip_config import clip_text_config
from latentmill.engine.loading.config import Json

if TYPE_CHECKING:
    from torch import Tensor, nn

_POSITIONS = "embeddings.position_ids"
"""A constant, 0 to 76, that older checkpoints carry along."""

_OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipEncoder(TextEncoderSpec):
    """CLIP's text encoder.

    `penultimate` takes the states before the last layer and without the final norm; `projection` gives a pooled state.
    That state is not projected where it is `unprojected`; with `pooled_only` no token's state is used. Single files
    name the weights as transformers does, whoever trained them, where there is an `alias`.
    """

    penultimate: bool = False
    projection: bool = False
    unprojected: bool = False
    pooled_only: bool = False

    tokenizer_class: ClassVar[str] = "CLIPTokenizer"
    usual_tokenizer: ClassVar[str] = "openai/clip-vit-large-patch14"

    @property
    def width(self) -> int:
        return 0 if self.pooled_only else int(self.config["hidden_size"])

    @property
    def pooled_width(self) -> int:
        if self.unprojected:
            return int(self.config["hidden_size"])
        return int(self.config["projection_dim"]) if self.projection else 0

    @property
    def is_open_clip(self) -> bool:
        """Whether single files name its weights as OpenCLIP does: those with its activation function do."""
        return self.config.get("hidden_act") == "gelu" and not self.alias

    @staticmethod
    def checked_config(config: Json, where: str) -> dict[str, Any]:
        return clip_text_config(config, where)

    def build(self) -> nn.Module:
        from latentmill.engine.networks.clip import ClipTextNetwork

        return ClipTextNetwork(
            self.config,
            penultimate=self.penultimate,
            pools=self.projection or self.unprojected,
            projects=self.projection,
        )

    def encode(self, network: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded: tuple[Tensor, Tensor | None] = network(ids)
        return encoded

    def folder_name(self, key: str) -> str | None:
        key = key.removeprefix("text_model.")
        return None if key == _POSITIONS else key

    def original_name(self, prefix: str, key: str) -> Origin:
        if self.is_open_clip:
            return _open_clip_origin(f"{prefix}model.", key)
        outside = key.startswith("text_projection.")
        return Origin(f"{prefix}transformer.{key}" if outside else f"{prefix}transformer.text_model.{key}")

    def original_facts(self) -> tuple[str, tuple[tuple[str, Any, Any], ...]]:
        if self.is_open_clip:
            return "FrozenOpenCLIPEmbedder", (("layer", "penultimate", "last"),)
        return "FrozenCLIPEmbedder", (("layer", "last", "last"), ("max_length", self.max_tokens, 77))


def _open_clip_origin(prefix: str, key: str) -> Origin:
    """OpenCLIP keeps queries, keys and values in one matrix, and its projection the other way round."""
    if key == "text_projection.weight":
        return Origin(f"{prefix}text_projection", transposed=True)
    if key in _OPEN_CLIP_NAMES:
        return Origin(prefix + _OPEN_CLIP_NAMES[key])
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        raise unnamed(key)
    block, layer, kind = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
    if layer in _THIRDS:
        return Origin(f"{block}attn.in_proj_{kind}", third=_THIRDS[layer])
    return Origin(f"{block}{_OPEN_CLIP_LAYERS[layer]}.{kind}")


def clip_config(shapes: Shapes, prefix: str) -> Json:
    """The config of OpenAI's encoder in a single file: 64 features a head in every published one."""
    prefix += "transformer.text_model."
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d{1,3})\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        # As published; the pooled state, which these two are about, is not asked for.
        "projection_dim": width,
        "eos_token_id": 2,
    }


def renamed_clip_config(shapes: Shapes, prefix: str, *, open_clip: bool) -> Json:
    """The config of either encoder in a single file that names its weights as transformers does."""
    config = clip_config(shapes, prefix)
    if not open_clip:
        return config
    projected = shapes[f"{prefix}transformer.text_projection.weight"][0]
    return {**config, "hidden_act": "gelu", "projection_dim": projected}


def open_clip_config(shapes: Shapes, prefix: str, *, unused_layers: int = 0) -> Json:
    """The config of OpenCLIP's encoder in a single file, less the layers that the model was trained without."""
    prefix += "model."
    vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d{1,3})\.") - unused_layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes[f"{prefix}positional_embedding"][0],
        "hidden_act": "gelu",
        "projection_dim": width if unused_layers else shapes[f"{prefix}text_projection"][1],
        # The pooled state is that of the highest token, which is the end mark: transformers' rule for this number.
        "eos_token_id": 2,
    }
