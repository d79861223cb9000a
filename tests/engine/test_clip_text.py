"""CLIP's text encoder against transformers', on random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentmill.engine.families.clip import ClipEncoder
from latentmill.engine.loading.clip_config import clip_text_config

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 48,
    "layer_norm_eps": 1e-4,
}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 98], ids=["highest token", "end mark"])
@pytest.mark.parametrize("penultimate", [False, True], ids=["last", "penultimate"])
def test_states_and_the_pooled_state_are_those_of_transformers(activation, end, penultimate):
    torch.manual_seed(5)
    config = clip_text_config({**SMALL, "hidden_act": activation, "eos_token_id": end}, "here")
    reference = CLIPTextModelWithProjection(CLIPTextConfig(**config, bos_token_id=97, pad_token_id=1)).eval()
    encoder = ClipEncoder(
        component="text_encoder", tokenizer="tokenizer", penultimate=penultimate, projection=True, config=config
    )
    network = encoder.build().eval()
    network.load_state_dict({key.removeprefix("text_model."): part for key, part in reference.state_dict().items()})
    ids = torch.randint(3, 97, (3, 77))
    ids[0, 9:], ids[1, 30], ids[2, 76] = 98, 98, 98
    with torch.inference_mode():
        theirs = reference(ids, output_hidden_states=True)
        states, pooled = encoder.encode(network, ids)
    expected = theirs.hidden_states[-2] if penultimate else theirs.last_hidden_state
    assert torch.allclose(states, expected, atol=1e-6)
    assert torch.allclose(pooled, theirs.text_embeds, atol=1e-6)
