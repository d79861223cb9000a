"""Latent diffusion's own text-to-image models (arXiv:2112.10752): a text encoder trained along, KL or VQ latents."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from latentmill.engine.families import compvis
from latentmill.engine.families.family import Family, Origin, Shapes, SingleFile, TextEncoderSpec, count, renamed
from latentmill.engine.loading.clip_config import LAYERS_LIMIT, POSITIONS_LIMIT, TOKENS_LIMIT
from latentmill.engine.loading.config import WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor, nn

_PREFIX = "cond_stage_model."
_FOLDER_NAMES = {
    r"embed_tokens\.": "token_embedding.",
    r"embed_positions\.": "position_embedding.",
    r"layer_norm\.": "norm.",
    r"(layers\.\d+\.)self_attn_layer_norm\.": r"\1attention_norm.",
    r"(layers\.\d+\.)self_attn\.(q|k|v)_proj\.": r"\1attention.to_\2.",
    r"(layers\.\d+\.)self_attn\.out_proj\.": r"\1attention.to_out.",
    r"(layers\.\d+\.)final_layer_norm\.": r"\1feed_forward_norm.",
    r"(layers\.\d+\.)fc1\.": r"\1expand.",
    r"(layers\.\d+\.)fc2\.": r"\1contract.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LdmBertEncoder(TextEncoderSpec):
    """The transformer that was trained along with the U-Net, on BERT's vocabulary."""

    tokenizer_class: ClassVar[str] = "BertTokenizer"
    usual_tokenizer: ClassVar[str] = "bert-base-uncased"

    @property
    def width(self) -> int:
        return int(self.config["d_model"])

    @staticmethod
    def checked_config(config: Json, where: str) -> dict[str, Any]:
        """The fields of diffusers' LDMBertConfig."""
        fields = Fields(config, where)
        if config.get("activation_function", "gelu") != "gelu":
            raise fields.refusal("activation_function", "gelu")
        return {
            "vocab_size": fields.whole("vocab_size", 30522, TOKENS_LIMIT),
            "max_position_embeddings": fields.whole("max_position_embeddings", 77, POSITIONS_LIMIT, least=2),
            "encoder_layers": fields.whole("encoder_layers", 32, LAYERS_LIMIT),
            "encoder_ffn_dim": fields.whole("encoder_ffn_dim", 5120, WIDTH_LIMIT),
            "encoder_attention_heads": fields.whole("encoder_attention_heads", 8, WIDTH_LIMIT),
            "head_dim": fields.whole("head_dim", 64, WIDTH_LIMIT),
            "d_model": fields.whole("d_model", 1024, WIDTH_LIMIT),
        }

    def build(self) -> nn.Module:
        from latentmill.engine.networks.bert import LdmBert

        return LdmBert(self.config)

    def encode(self, network: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return network(ids), None

    def folder_name(self, key: str) -> str | None:
        # The head that was trained along with the encoder is not used for pictures.
        return None if key.startswith("to_logits.") else renamed(key.removeprefix("model."), _FOLDER_NAMES)

    def original_name(self, prefix: str, key: str) -> Origin:
        """The original counts attention and feed-forward as layers of their own, each a norm (0) and a block (1)."""
        prefix += "transformer."
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        if match is None:
            return Origin(
                prefix + renamed(key, {r"token_embedding\.": "token_emb.", r"position_embedding\.": "pos_emb.emb."})
            )
        attention, feed_forward = 2 * int(match[1]), 2 * int(match[1]) + 1
        names = {
            r"attention_norm\.": f"{attention}.0.",
            r"attention\.": f"{attention}.1.",
            r"feed_forward_norm\.": f"{feed_forward}.0.",
            r"expand\.": f"{feed_forward}.1.net.0.0.",
            r"contract\.": f"{feed_forward}.1.net.2.",
        }
        return Origin(f"{prefix}attn_layers.layers.{renamed(match[2], names)}")

    def original_facts(self) -> tuple[str, tuple[tuple[str, Any, Any], ...]]:
        return "BERTEmbedder", (
            ("n_embed", self.width, None),
            ("n_layer", self.config["encoder_layers"], None),
            ("max_seq_len", self.max_tokens, 77),
        )


_ENCODER = LdmBertEncoder(component="bert", tokenizer="tokenizer")


def _encoders(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    prefix = f"{_PREFIX}transformer."
    inner, width = shapes[f"{prefix}attn_layers.layers.0.1.to_q.weight"]
    config = {
        "vocab_size": shapes[f"{prefix}token_emb.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}pos_emb.emb.weight"][0],
        "encoder_layers": count(shapes, re.escape(prefix) + r"attn_layers\.layers\.(\d{1,3})\.") // 2,
        "encoder_ffn_dim": shapes[f"{prefix}attn_layers.layers.1.1.net.0.0.weight"][0],
        "encoder_attention_heads": inner // 64,
        "head_dim": 64,
        "d_model": width,
    }
    return (replace(_ENCODER, config=config),)


_MARKERS = (compvis.UNET_MARKER, f"{_PREFIX}transformer.token_emb.weight")

FAMILY = Family(
    name="latent-diffusion",
    pipelines=("LDMTextToImagePipeline", "LatentDiffusionPipeline"),
    text_encoders=(_ENCODER,),
    denoiser=compvis.DENOISER,
    autoencoder=replace(compvis.AUTOENCODER, component="vqvae"),
    # A file with a codebook has the markers of both, so the more special one comes first.
    single_files=(
        SingleFile(
            title="latent diffusion text2img with a VQ autoencoder",
            markers=(*_MARKERS, compvis.CODEBOOK),
            denoiser=partial(compvis.unet_config, head_dim=32, sample_size=64),
            autoencoder=partial(compvis.vae_config, scaling_factor=1.0),
            text_encoders=_encoders,
            scheduler={**compvis.SCHEDULE, "beta_start": 0.0015, "beta_end": 0.0195},
        ),
        SingleFile(
            title="latent diffusion text2img",
            markers=_MARKERS,
            denoiser=partial(compvis.unet_config, heads=8, sample_size=32),
            autoencoder=partial(compvis.vae_config, scaling_factor=0.18215),
            text_encoders=_encoders,
            scheduler=compvis.SCHEDULE,
        ),
    ),
    encoder_prefix=_PREFIX,
    ignored=(*compvis.IGNORED, r"cond_stage_model\.transformer\.to_logits\."),
)
