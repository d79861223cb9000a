"""T5's encoder as a text encoder: shared by several families."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latentmill.engine.families.family import Origin, Shapes, TextEncoderSpec, count, renamed
from latentmill.engine.loading.clip_config import LAYERS_LIMIT, TOKENS_LIMIT
from latentmill.engine.loading.config import WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor, nn

_NAMES = {
    r"(shared|encoder\.embed_tokens)\.": "token_embedding.",
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.": "position_bias.",
    r"encoder\.final_layer_norm\.": "norm.",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.": r"layers.\1.attention.",
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.": r"layers.\1.attention_norm.",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.": r"layers.\1.feed_forward.",
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.": r"layers.\1.feed_forward_norm.",
}
_ORIGINAL_NAMES = {
    r"token_embedding\.": "shared.",
    r"position_bias\.": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    r"norm\.": "encoder.final_layer_norm.",
    r"layers\.(\d+)\.attention\.": r"encoder.block.\1.layer.0.SelfAttention.",
    r"layers\.(\d+)\.attention_norm\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"layers\.(\d+)\.feed_forward\.": r"encoder.block.\1.layer.1.DenseReluDense.",
    r"layers\.(\d+)\.feed_forward_norm\.": r"encoder.block.\1.layer.1.layer_norm.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Encoder(TextEncoderSpec):
    """T5's encoder. Its positions are relative: `length` is what the model was trained with, the end mark included."""

    length: int = 512

    tokenizer_class: ClassVar[str] = "T5TokenizerFast"
    usual_tokenizer: ClassVar[str] = "google-t5/t5-base"
    marks: ClassVar[int] = 1
    spare_tokens: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return int(self.config["d_model"])

    @property
    def max_tokens(self) -> int:
        return self.length

    @staticmethod
    def checked_config(config: Json, where: str) -> dict[str, Any]:
        """The fields of transformers' T5Config that shape the encoder."""
        fields = Fields(config, where)
        kind = config.get("feed_forward_proj", "relu")
        if kind != "gated-gelu":
            raise fields.refusal("feed_forward_proj", "gated-gelu, as in T5 1.1")
        head_dim = fields.whole("d_kv", 64, WIDTH_LIMIT)
        buckets = fields.whole("relative_attention_num_buckets", 32, WIDTH_LIMIT, least=4)
        return {
            "vocab_size": fields.whole("vocab_size", 32128, TOKENS_LIMIT),
            "d_model": fields.whole("d_model", 512, WIDTH_LIMIT),
            "d_kv": head_dim,
            "d_ff": fields.whole("d_ff", 2048, WIDTH_LIMIT),
            "num_layers": fields.whole("num_layers", 6, LAYERS_LIMIT),
            "num_heads": fields.whole("num_heads", 8, WIDTH_LIMIT // head_dim),
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": fields.whole(
                "relative_attention_max_distance", 128, WIDTH_LIMIT, least=buckets
            ),
            "layer_norm_epsilon": fields.number("layer_norm_epsilon", 1e-6, 1.0),
            "feed_forward_proj": kind,
        }

    def build(self) -> nn.Module:
        from latentmill.engine.networks.t5 import T5

        return T5(self.config)

    def encode(self, network: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return network(ids), None

    def folder_name(self, key: str) -> str | None:
        return renamed(key, _NAMES)

    def original_name(self, prefix: str, key: str) -> Origin:
        return Origin(f"{prefix}transformer.{renamed(key, _ORIGINAL_NAMES)}")

    def original_facts(self) -> tuple[str, tuple[tuple[str, Any, Any], ...]]:
        return "FrozenT5Embedder", (("max_length", self.length, 77),)


def t5_config(shapes: Shapes, prefix: str) -> Json:
    """The config of an encoder in a single file."""
    vocabulary, width = shapes[f"{prefix}shared.weight"]
    first = f"{prefix}encoder.block.0.layer."
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{first}1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count(shapes, re.escape(prefix) + r"encoder\.block\.(\d{1,3})\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }
