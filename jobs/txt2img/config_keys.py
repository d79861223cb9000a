"""Every key of the original's configs: what its constructors take, and what becomes of each here.

A key is honoured or compared with the checkpoint (`read`, by `config.py`), has one value that is built here (`only`,
where the original's default is among them), or changes no picture (`inert`). Any other is refused by name, as the
original's constructors did. The facts are those of CompVis's `ldm` and of Stability's version of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The keys of one constructor; `open` where the original, too, passes over what it does not know."""

    path: str
    read: frozenset[str]
    inert: frozenset[str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    open: bool = False


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MODEL, UNET = "model.params", "model.params.unet_config.params"
FIRST, TEXT = "model.params.first_stage_config", "model.params.cond_stage_config"
DDCONFIG = f"{FIRST}.params.ddconfig"

SECTIONS = (
    Section(
        path=MODEL,
        read=_words(
            "unet_config first_stage_config cond_stage_config parameterization use_ema scale_factor timesteps channels "
            "beta_schedule linear_start linear_end cosine_s"
        ),
        # Of training and its reports, of the ancestral loop that the command does not run, of the size that it sets.
        inert=_words(
            "loss_type monitor first_stage_key cond_stage_key image_size log_every_t clip_denoised "
            "original_elbo_weight v_posterior l_simple_weight scheduler_config "
            "use_positional_encodings learn_logvar logvar_init use_fp16 "
            "num_timesteps_cond cond_stage_trainable concat_mode ignore_keys load_only_unet make_it_fit ucg_training "
            "reset_num_ema_updates"
        ),
        only={
            "conditioning_key": ("crossattn",),
            "scale_by_std": (False,),
            "given_betas": (),
            "cond_stage_forward": (),
            "ckpt_path": (),
            "reset_ema": (False,),
            "force_null_conditioning": (False,),
        },
    ),
    Section(
        path=UNET,
        read=_words(
            "in_channels out_channels model_channels channel_mult num_res_blocks attention_resolutions num_heads "
            "num_head_channels transformer_depth context_dim use_linear_in_transformer"
        ),
        # The last three are of the attention without text, which a U-Net with transformers does not have.
        inert=_words("image_size dropout use_checkpoint use_fp16 num_heads_upsample use_new_attention_order legacy"),
        only={
            "conv_resample": (True,),
            "dims": (2,),
            "num_classes": (),
            "use_scale_shift_norm": (False,),
            "resblock_updown": (False,),
            "use_spatial_transformer": (True,),
            "n_embed": (),
            "disable_self_attentions": (),
            "num_attention_blocks": (),
            "disable_middle_self_attn": (False,),
            "adm_in_channels": (),
        },
    ),
    Section(
        path=f"{FIRST}.params",
        read=_words("ddconfig embed_dim n_embed"),
        # `ckpt_path` too: the checkpoint holds every weight of the autoencoder.
        inert=_words(
            "lossconfig ckpt_path ignore_keys image_key colorize_nlabels monitor batch_resize_range scheduler_config "
            "lr_g_factor remap sane_index_shape use_ema ema_decay learn_logvar"
        ),
    ),
    Section(
        path=DDCONFIG,
        read=_words("z_channels ch ch_mult num_res_blocks attn_resolutions resolution"),
        inert=_words("dropout in_channels double_z"),
        only={
            "out_ch": (3,),
            "resamp_with_conv": (True,),
            "give_pre_end": (False,),
            "tanh_out": (False,),
            "use_linear_attn": (False,),
            "attn_type": ("vanilla", "vanilla-xformers"),
        },
        open=True,
    ),
    Section(
        path=f"{TEXT}.params",
        read=_words("tokenizer version layer max_length max_seq_len n_embed n_layer"),
        # The checkpoint's shapes tell the architecture and the vocabulary.
        inert=_words("arch device freeze layer_idx vocab_size embedding_dropout"),
        only={"use_tokenizer": (True,)},
    ),
)
