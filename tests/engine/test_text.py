"""Emphasis and long prompts change the conditioning as they say, and nothing else does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec
from tests.engine.families import write_sdxl

pytestmark = pytest.mark.slow

LONG = " ".join(f"word{number}" for number in range(40))
"""With a token a byte: over 200 tokens, three chunks of 75."""


def load(folder: Path, **options) -> Engine:
    spec = ModelSpec(model=str(folder), safety="none", **options)
    return Engine.load(spec, device="cpu", dtype="float32", batch_size=4)


def states(folder: Path, chunk_ids: list[int]) -> torch.Tensor:
    """`(77, d)` straight from the library's text model, for up to 75 tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    end = tokenizer.eos_token_id
    ids = [tokenizer.bos_token_id, *chunk_ids, end] + [tokenizer.pad_token_id] * (75 - len(chunk_ids))
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0]


def ids_of(folder: Path, text: str) -> list[int]:
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")(text, add_special_tokens=False)["input_ids"]


def request(prompt: str, **changes) -> GenerationRequest:
    base = GenerationRequest(prompt=prompt, width=64, height=64, num_inference_steps=3, guidance_scale=4.0, seed=5)
    return dataclasses.replace(base, **changes)


def context(engine: Engine, text: str, chunks: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return engine._models.text.encode([text], chunks).context[0].clone()


def test_emphasis_multiplies_states_and_restores_their_mean(eps_model):
    engine = load(eps_model, prompt_syntax="a1111")
    ids = [ids_of(eps_model, part) for part in ("a ", "red", " cat")]
    plain = states(eps_model, [token for part in ids for token in part])
    weights = torch.ones(77)
    weights[1 + len(ids[0]) : 1 + len(ids[0]) + len(ids[1])] = 1.5
    expected = plain * weights[:, None]
    expected *= plain.mean() / expected.mean()
    found = context(engine, "a (red:1.5) cat")
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_prompt_without_emphasis_keeps_its_very_bits_in_every_syntax(eps_model):
    expected = context(load(eps_model), "a red cat")
    for options in ({"prompt_syntax": "a1111"}, {"prompt_syntax": "novelai"}, {"long_prompts": "chunk"}):
        assert torch.equal(context(load(eps_model, **options), "a red cat"), expected)


def test_plain_reads_brackets_as_text(eps_model):
    assert not torch.equal(context(load(eps_model), "a (red) cat"), context(load(eps_model), "a red cat"))


def test_long_prompts_are_encoded_chunk_by_chunk(eps_model):
    engine = load(eps_model, long_prompts="chunk")
    text = engine._models.text
    ids = ids_of(eps_model, LONG)
    assert text.chunks_needed(LONG) == -(-len(ids) // 75) == 4 - (len(ids) <= 225)
    parts = [ids[start : start + 75] for start in range(0, len(ids), 75)]
    expected = torch.cat([states(eps_model, part) for part in parts])
    assert torch.allclose(context(engine, LONG, len(parts)), expected, atol=1e-5)
    short = context(engine, "a cat", len(parts))
    assert torch.allclose(short[77:154], states(eps_model, []), atol=1e-5), "a shorter prompt goes on with empty chunks"


def test_break_starts_a_chunk_where_prompts_are_chunked_and_only_there(eps_model):
    chunked = load(eps_model, prompt_syntax="a1111", long_prompts="chunk")
    assert chunked._models.text.chunks_needed("a cat BREAK a dog") == 2
    expected = torch.cat([states(eps_model, ids_of(eps_model, part)) for part in ("a cat", "a dog")])
    assert torch.allclose(context(chunked, "a cat BREAK a dog", 2), expected, atol=1e-5)
    assert load(eps_model, prompt_syntax="a1111")._models.text.chunks_needed("a cat BREAK a dog") == 1


def test_the_end_of_a_long_prompt_counts_only_where_it_is_chunked(eps_model):
    for options, equal in (({}, True), ({"long_prompts": "chunk"}, False)):
        engine = load(eps_model, **options)
        one, other = engine.generate([request(LONG + " red"), request(LONG + " blue")])
        assert np.array_equal(one.pixels, other.pixels) is equal


def test_rows_of_different_lengths_keep_their_bits_in_one_call(eps_model):
    engine = load(eps_model, prompt_syntax="a1111", long_prompts="chunk")
    rows = [
        request("a (red) cat"),
        request(LONG),
        request("a cat", negative_prompt=LONG),
        request("(((" + LONG),
        request("a cat BREAK [a dog]"),
        request("a cat", negative_prompt=LONG, guidance_scale=1.0),
    ]
    together = engine.generate(rows)
    for row, result in zip(rows, together, strict=True):
        assert np.array_equal(engine.generate([row])[0].pixels, result.pixels)
    assert [result.prompt_tokens for result in together][2] == 4


def test_a_negative_prompt_has_no_effect_without_guidance(eps_model):
    engine = load(eps_model, long_prompts="chunk")
    with_one, without = engine.generate(
        [request("a cat", negative_prompt=LONG, guidance_scale=1.0), request("a cat", guidance_scale=1.0)]
    )
    assert np.array_equal(with_one.pixels, without.pixels)


def test_too_long_a_prompt_is_refused_alone_where_that_is_asked_for(eps_model):
    engine = load(eps_model, long_prompts="error")
    fine, long, negative = engine.generate([request("a cat"), request(LONG), request("a cat", negative_prompt=LONG)])
    assert [fine.status, long.status, negative.status] == ["ok", "failed", "failed"]
    assert "the limit is 75; shorten it" in long.error


@pytest.mark.parametrize("option", [{"prompt_syntax": "compel"}, {"long_prompts": "wrap"}])
def test_an_unknown_choice_is_refused(eps_model, option):
    with pytest.raises(EngineError, match="expected one of plain, a1111, novelai and one of truncate, chunk, error"):
        load(eps_model, **option)


def test_emphasis_weighs_in_each_of_two_encoders_and_leaves_the_pooled_state(tmp_path):
    folder = write_sdxl(tmp_path / "sdxl")
    text = load(folder, prompt_syntax="a1111")._models.text
    widths = [loaded.spec.width for loaded in text._encoders]
    with torch.inference_mode():
        plain, weighted = text.encode(["a red cat"]), text.encode(["a (red:1.6) cat"])
    changed = (plain.context - weighted.context).abs()[0].split(widths, dim=-1)
    assert len(changed) == 2
    assert all(part.max() > 1e-2 for part in changed)
    assert torch.equal(plain.pooled, weighted.pooled)


def test_a_prompt_is_tokenised_once_a_request(eps_model):
    for options in ({}, {"prompt_syntax": "a1111", "long_prompts": "chunk"}):
        engine = load(eps_model, **options)
        tokenizer = engine._models.text._encoders[0].tokenizer
        seen = []
        ids = tokenizer.ids
        tokenizer.ids = lambda texts, seen=seen, ids=ids: (seen.extend(texts), ids(texts))[1]
        rows = [request("a cat", negative_prompt="a dog"), request("a hill"), request("", guidance_scale=1.0)]
        assert [result.status for result in engine.generate(rows)] == ["ok"] * 3
        assert sorted(seen) == ["", "a cat", "a dog", "a hill"]


def test_a_remembered_prompt_does_not_hold_the_batch_it_was_encoded_in(eps_model):
    text = load(eps_model)._models.text
    with torch.inference_mode():
        text.encode(["a cat"])
    (states, _pooled), *_ = text._cache.values()
    assert states.untyped_storage().nbytes() == states.nbytes
