"""The configs of CLIP's text and image encoders: the fields that shape the networks, each checked.

No other field reaches a library, as a config may also name code or devices. A field that is left out has the library's
own default, since the library leaves such fields out when it writes a file.
"""

from __future__ import annotations

from typing import Any

from latentmill.engine.loading.config import WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields

TOKENS_LIMIT = 2**22
POSITIONS_LIMIT = 2**13
LAYERS_LIMIT = 256
SIDE_LIMIT = 2**12
"""Of an encoder: tokens, places, layers, and pixels along a side."""

_ACTIVATIONS = ("quick_gelu", "gelu")


def clip_text_config(config: Json, where: str) -> dict[str, Any]:
    """What shapes the text encoder. Raises EngineError for a field that is not what it should be."""
    fields = Fields(config, where)
    return {
        **_clip_layers(fields, config, width=512, heads=8, hidden=2048),
        "vocab_size": fields.whole("vocab_size", 49408, TOKENS_LIMIT),
        "max_position_embeddings": fields.whole("max_position_embeddings", 77, POSITIONS_LIMIT, least=2),
        "projection_dim": fields.whole("projection_dim", 512, WIDTH_LIMIT),
        # The pooled state is that of the first end mark, or of the highest token where this is 2.
        "eos_token_id": fields.whole("eos_token_id", 49407, TOKENS_LIMIT, least=0),
    }


def clip_vision_config(config: Json, where: str) -> dict[str, Any]:
    """The arguments of CLIPVisionConfig. Raises EngineError for a field that is not what it should be."""
    fields = Fields(config, where)
    side = fields.whole("image_size", 224, SIDE_LIMIT)
    return {
        **_clip_layers(fields, config, width=768, heads=12, hidden=3072),
        # The library has several ways to compute attention, and their bits differ: always use the same one.
        "attn_implementation": "sdpa",
        "image_size": side,
        "patch_size": fields.whole("patch_size", 32, side),
    }


def _clip_layers(fields: Fields, config: Json, *, width: int, heads: int, hidden: int) -> dict[str, Any]:
    """What shapes the transformer layers of either of CLIP's encoders."""
    width = fields.whole("hidden_size", width, WIDTH_LIMIT)
    heads = fields.whole("num_attention_heads", heads, WIDTH_LIMIT)
    activation = config.get("hidden_act", "quick_gelu")
    if width % heads:
        raise fields.refusal("num_attention_heads", f"a number that divides hidden_size, which is {width}")
    if activation not in _ACTIVATIONS:
        raise fields.refusal("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": fields.whole("intermediate_size", hidden, WIDTH_LIMIT),
        "num_hidden_layers": fields.whole("num_hidden_layers", 12, LAYERS_LIMIT),
        "hidden_act": activation,
        "layer_norm_eps": fields.number("layer_norm_eps", 1e-5, 1.0),
    }
