"""Stable Diffusion 1 and 2: one CLIP encoder, which is OpenAI's or OpenCLIP's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from latentmill.engine.families import compvis
from latentmill.engine.families.clip import ClipEncoder, clip_config, open_clip_config
from latentmill.engine.families.family import Family, Shapes, SingleFile, TextEncoderSpec

_PREFIX = "cond_stage_model."
_ENCODER = ClipEncoder(component="text_encoder", tokenizer="tokenizer")


def _encoder_of_1(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    return (replace(_ENCODER, config=clip_config(shapes, _PREFIX)),)


def _encoder_of_2(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    # One layer less than the file has, then the final norm: what its builders call penultimate. OpenCLIP pads with 0.
    return (replace(_ENCODER, config=open_clip_config(shapes, _PREFIX, unused_layers=1), pad_id=0),)


def _ignored_of(encoder: TextEncoderSpec) -> tuple[str, ...]:
    """Stable Diffusion 2 leaves the encoder's last layer unused, and its projection, as it does not pool."""
    if not (isinstance(encoder, ClipEncoder) and encoder.is_open_clip):
        return ()
    last = encoder.config["num_hidden_layers"]
    return (
        rf"cond_stage_model\.model\.transformer\.resblocks\.{last}\.",
        r"cond_stage_model\.model\.text_projection$",
    )


_VAE = partial(compvis.vae_config, scaling_factor=0.18215)

FAMILY = Family(
    name="stable-diffusion",
    pipelines=("StableDiffusionPipeline",),
    text_encoders=(_ENCODER,),
    denoiser=compvis.DENOISER,
    autoencoder=compvis.AUTOENCODER,
    single_files=(
        SingleFile(
            title="Stable Diffusion 1",
            markers=(compvis.UNET_MARKER, f"{_PREFIX}transformer.text_model.embeddings.token_embedding.weight"),
            denoiser=partial(compvis.unet_config, heads=8, sample_size=64),
            autoencoder=_VAE,
            text_encoders=_encoder_of_1,
            scheduler=compvis.SCHEDULE,
        ),
        SingleFile(
            title="Stable Diffusion 2",
            markers=(compvis.UNET_MARKER, f"{_PREFIX}model.token_embedding.weight"),
            denoiser=partial(compvis.unet_config, head_dim=64, sample_size=96),
            autoencoder=_VAE,
            text_encoders=_encoder_of_2,
            scheduler=compvis.SCHEDULE,
            prediction_type=None,
            prediction_hint="v_prediction for a 768-v model, epsilon for a 512-base or Turbo model",
        ),
    ),
    encoder_prefix=_PREFIX,
    ignored=(
        *compvis.IGNORED,
        r"cond_stage_model\.(transformer\.)?(text_model\.)?embeddings\.position_ids$",
        r"cond_stage_model\.(model\.)?logit_scale$",
        r"cond_stage_model\.model\.attn_mask$",
        # CLIP's projection into the space that it shares with pictures: web UIs save it along, no model here uses it
        r"cond_stage_model\.(transformer\.)?text_projection(\.weight)?$",
    ),
    ignored_of=_ignored_of,
)
