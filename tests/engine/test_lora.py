"""LoRAs: the reference library's pictures in every form of file, and rows that share a batch at scales of their own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from latentmill.engine import EMBEDDED_MODEL, Engine, EngineError, GenerationRequest, ModelSpec, describe_model
from latentmill.engine.acceleration import compiled
from latentmill.engine.loading.keys import original_names
from latentmill.engine.loading.layout import find_model
from latentmill.engine.loading.lora import check_loras
from latentmill.engine.loras import as_conditions
from latentmill.engine.networks.lora import LowRank
from latentmill.engine.types import LoraSpec
from tests.engine.families import assert_same_pictures, reference_pictures, requests, write_sd1, write_sdxl
from tests.engine.loras import (
    ALPHA,
    RANK,
    Terms,
    random_terms,
    saved,
    write_diffusers,
    write_early,
    write_kohya,
    write_peft,
)

pytestmark = pytest.mark.slow

SCALE = 0.7
LORAS = Path(__file__).parents[2] / "configs" / "loras"
WRITERS = {"sd": write_sd1, "sdxl": write_sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"lora-{family}"
        return folder if folder.exists() else WRITERS[family](folder)

    return made


def load(folder: Path, batch_size: int = 4, syntax: str = "plain", **loras: Path) -> Engine:
    specs = tuple(LoraSpec(name=name, path=str(path)) for name, path in loras.items())
    spec = ModelSpec(model=str(folder), safety="none", loras=specs, prompt_syntax=syntax)
    return Engine.load(spec, device="cpu", dtype="float32", batch_size=batch_size)


def pictures(engine: Engine, rows: list[GenerationRequest]) -> np.ndarray:
    results = engine.generate(rows)
    assert [result.error for result in results] == [None] * len(rows)
    return np.stack([result.pixels for result in results if result.pixels is not None])


def scaled(rows: list[GenerationRequest], *scales: float, name: str = "ink") -> list[GenerationRequest]:
    """The rows with a scale each, or all with the one that is given."""
    given = scales * len(rows) if len(scales) == 1 else scales
    return [dataclasses.replace(row, loras=((name, scale),)) for row, scale in zip(rows, given, strict=True)]


def terms_of(pipeline: DiffusionPipeline, *, convolutions: bool = False) -> dict[str, Terms]:
    """One for each network that a LoRA may change, by component."""
    networks = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    return {
        name: random_terms(network, seed, convolutions=convolutions and name == "unet")
        for seed, (name, network) in enumerate(networks.items())
        if network is not None
    }


def kohya(path: Path, terms: dict[str, Terms], **more: Any) -> Path:
    alone = "text_encoder_2" not in terms
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te" if alone else "lora_te1", "text_encoder_2": "lora_te2"}
    return write_kohya(path, {prefixes[name]: layers for name, layers in terms.items()}, **more)


FORMS: dict[str, Callable[[Path, dict[str, Terms]], Path]] = {
    "kohya": kohya,
    "kohya without alphas": lambda path, terms: kohya(path, terms, alpha=None),
    "kohya, text encoders alone": lambda path, terms: kohya(path, {k: v for k, v in terms.items() if k != "unet"}),
    "diffusers": write_diffusers,
    "diffusers with its metadata": lambda path, terms: write_diffusers(
        path,
        {"unet": terms["unet"]},
        metadata={"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.target_modules": sorted(terms["unet"])},
    ),
}


def original_names_of_sdxl(path: Path, terms: dict[str, Terms]) -> Path:
    """As kohya's trainer names the layers of SDXL's U-Net: by the original's blocks."""
    blueprint = find_model(ModelSpec(model=str(write_sdxl(path.parent / "sdxl")))).blueprint
    layers = {name: pair for name, pair in terms["unet"].items() if ".attentions." in name}
    origins = original_names(blueprint, "unet", [f"{name}.weight" for name in layers])
    named = {
        origins[f"{name}.weight"].key.removeprefix("model.diffusion_model.").removesuffix(".weight"): pair
        for name, pair in layers.items()
    }
    assert any(name.startswith("input_blocks") for name in named)
    return kohya(path, {**terms, "unet": named})


CASES = [
    pytest.param(family, form, every, id=f"{family}, {form}, {'every layer' if every else 'attention'}", marks=marks)
    for family in WRITERS
    for form in FORMS
    for every in (False, True)
    for marks in [
        [] if (family, form, every) in {("sd", "kohya", True), ("sd", "diffusers", False)} else [pytest.mark.long]
    ]
]
CASES += [pytest.param("sdxl", "original names", False, id="sdxl, kohya, by the original names")]
FORMS["original names"] = original_names_of_sdxl


@pytest.mark.parametrize(("family", "form", "convolutions"), CASES)
def test_pictures_equal_the_reference_librarys(family, form, convolutions, folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders(family), safety_checker=None)
    rows = scaled(requests(32), SCALE)
    plain = reference_pictures(pipeline, rows)
    file = FORMS[form](tmp_path / "ink.safetensors", terms_of(pipeline, convolutions=convolutions))
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="ink")
    pipeline.set_adapters(["ink"], [SCALE])
    expected = reference_pictures(pipeline, rows)
    assert np.abs(expected.astype(int) - plain).mean() > 1, "the LoRA has no effect"
    engine = load(folders(family), ink=file)
    assert_same_pictures(pictures(engine, rows), expected)
    assert_same_pictures(pictures(engine, scaled(rows, 0.0)), plain)


def test_merged_into_the_weights_it_draws_nearly_the_same(folders, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folders("sd") / "unet")
    text = CLIPTextModel.from_pretrained(folders("sd") / "text_encoder")
    terms = {"unet": random_terms(unet, 1, convolutions=True), "text_encoder": random_terms(text, 2)}
    file = kohya(tmp_path / "ink.safetensors", terms)
    beside = load(folders("sd"), ink=file)
    spec = LoraSpec(name="ink", path=str(file), merged=SCALE)
    merged = Engine.load(
        ModelSpec(model=str(folders("sd")), safety="none", loras=(spec,)), device="cpu", dtype="float32", batch_size=4
    )
    rows = scaled(requests(32), SCALE)
    assert_same_pictures(pictures(merged, rows), pictures(beside, rows))
    assert merged.execution_class == f"{beside.execution_class}, merged ink:0.7"
    (result,) = merged.generate(scaled(rows[:1], 0.5))
    assert result.error == "LoRA ink is part of the weights at scale 0.7; ask for that one"


@pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning")
def test_two_loras_in_one_row_equal_the_reference_librarys(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders("sd"), safety_checker=None)
    terms = {name: {"unet": random_terms(pipeline.unet, seed)} for seed, name in enumerate(("ink", "clay"))}
    files = {name: kohya(tmp_path / f"{name}.safetensors", layers) for name, layers in terms.items()}
    for name, file in files.items():
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["ink", "clay"], [0.5, -0.8])
    rows = [dataclasses.replace(row, loras=(("ink", 0.5), ("clay", -0.8))) for row in requests(32)]
    assert_same_pictures(pictures(load(folders("sd"), **files), rows), reference_pictures(pipeline, rows))


def own_unet(folder: Path, lora: Path) -> Callable[..., Tensor]:
    """Ours with the LoRA at scale 1, for two rows."""
    run = load(folder, ink=lora)._models.run
    return partial(run, **as_conditions({"ink": torch.ones(2)}))


def assert_same_output(reference: torch.nn.Module, ours: Callable[..., Tensor], plain: torch.nn.Module) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 77, 64)
    with torch.inference_mode():
        expected, without, found = reference(*inputs).sample, plain(*inputs).sample, ours(*inputs)
    assert (expected - without).abs().max() > 0.05 * expected.abs().max(), "the LoRA has no effect"
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


LAYERS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv", "time_emb_proj", "net.2"]
LYCORIS = {
    "LoHa": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=LAYERS),
    "LoHa with a core": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=LAYERS),
    "LoKr with a core": peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr of two factors": peft.LoKrConfig(
        r=RANK, alpha=ALPHA, target_modules=LAYERS, decompose_both=True, decompose_factor=8
    ),
    "LoRA": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS),
    "LoRA by its rank's root": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, use_rslora=True),
    "LoRA with patterns": peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, rank_pattern={"to_q": 5}, alpha_pattern={"to_q": 1.5}
    ),
}


QUICK = {("LoHa", "kohya"), ("LoKr with a core", "kohya"), ("LoRA with patterns", "peft")}
LYCORIS_CASES = [
    pytest.param(
        form, spelling, id=f"{form} by {spelling}", marks=[] if (form, spelling) in QUICK else pytest.mark.long
    )
    for form in LYCORIS
    for spelling in (["peft"] if form.startswith("LoRA") else ["peft", "kohya"])
]


@pytest.mark.parametrize(("form", "spelling"), LYCORIS_CASES)
def test_forms_of_peft_equal_peft(form, spelling, folders, tmp_path):
    folder = folders("sd")
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    adapted = peft.get_peft_model(UNet2DConditionModel.from_pretrained(folder / "unet"), LYCORIS[form])
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "peft")
    place = tmp_path / "peft"
    if spelling == "kohya":
        tensors = load_file(place / "adapter_model.safetensors")
        renamed = {}
        for key, tensor in tensors.items():
            layer, _, part = key.removeprefix("base_model.model.").rpartition(".")
            renamed[f"lora_unet_{layer.replace('.', '_')}.{part}"] = tensor
            renamed[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)
        place = saved(tmp_path / "lycoris.safetensors", renamed)
    assert_same_output(adapted, own_unet(folder, place), plain)


def test_a_file_of_early_diffusers_is_the_same(folders, tmp_path):
    """Versions of diffusers that read these files are older than this one."""
    folder = folders("sd")
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    terms = {name: pair for name, pair in random_terms(plain, 1).items() if ".attn" in name}
    found, expected = (
        own_unet(folder, write(tmp_path / f"{number}.safetensors"))
        for number, write in enumerate(
            [lambda path: write_early(path, terms), lambda path: write_diffusers(path, {"unet": terms})]
        )
    )
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 77, 64)
    with torch.inference_mode():
        assert torch.equal(found(*inputs), expected(*inputs))
        assert not torch.equal(found(*inputs), plain(*inputs).sample)


@pytest.fixture(scope="module")
def two(eps_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs for a model, one of them for every layer, the other for its text encoder alone."""
    folder = tmp_path_factory.mktemp("two")
    unet = UNet2DConditionModel.from_pretrained(eps_model / "unet")
    text = CLIPTextModel.from_pretrained(eps_model / "text_encoder")
    ink = {"unet": random_terms(unet, 1, convolutions=True), "text_encoder": random_terms(text, 2)}
    return {
        "ink": kohya(folder / "ink.safetensors", ink),
        "clay": kohya(folder / "clay.safetensors", {"text_encoder": random_terms(text, 3, rank=1)}),
    }


@pytest.fixture(scope="module")
def adapted(eps_model: Path, two: dict[str, Path]) -> Engine:
    """An odd number of rows, as of tokens: kernels for matrices have most paths for what is left over."""
    return load(eps_model, batch_size=3, **two)


def row(number: int, **scales: float) -> GenerationRequest:
    return GenerationRequest(
        prompt=f"a red circle, number {number}",
        seed=number,
        width=64,
        height=64,
        num_inference_steps=2 + number % 2,
        guidance_scale=2.0 + number % 5,
        loras=tuple(scales.items()),
    )


def test_a_rows_bits_depend_on_its_own_scales_alone(eps_model, adapted, two):
    """In whatever slot, beside neighbours of other scales, of scale 0, and of other LoRAs; and where those are not
    even loaded."""
    scales = [{}, {"ink": 0.0}, {"ink": 0.5}, {"ink": 1.0}, {"clay": 0.8}, {"clay": 0.8, "ink": -0.5}, {"ink": 0.5}]
    rows = [row(number, **each) for number, each in enumerate(scales)]
    apart = [pictures(adapted, [each])[0] for each in rows]
    assert len({picture.tobytes() for picture in apart}) == len(rows)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        for place, picture in zip(order, pictures(adapted, [rows[place] for place in order]), strict=True):
            assert np.array_equal(picture, apart[place]), rows[place]
    assert np.array_equal(pictures(load(eps_model, batch_size=3), [rows[0]])[0], apart[0])
    alone = load(eps_model, batch_size=3, ink=two["ink"])
    assert np.array_equal(pictures(alone, [rows[2]])[0], apart[2])
    assert np.array_equal(pictures(alone, [row(1)])[0], apart[1])


def test_a_term_of_low_rank_gives_a_row_the_same_bits_in_every_slot():
    """Plain products with matrices of one to three columns do not, on CPUs."""
    for rank, rows in itertools.product((1, 2, 3), (2, 3, 4)):
        term = LowRank("ink", torch.randn(rank, 64), torch.randn(64, rank))
        own, found = torch.randn(77, 64), set()
        for slot in range(rows):
            batch = torch.randn(rows, 77, 64)
            batch[slot] = own
            found.add(term(batch, torch.ones(rows), torch.nn.Linear(64, 64))[slot].numpy().tobytes())
        assert len(found) == 1, (rank, rows)


def test_a_lora_that_is_not_finite_in_a_row_leaves_the_others_their_bits(eps_model, two):
    engine = load(eps_model, batch_size=3, **two)
    rows = [row(0), row(2, ink=0.5), row(4)]
    expected = pictures(engine, rows)
    for module in engine._models.denoiser.modules():
        if isinstance(module, LowRank) and module.name == "ink":
            module.down.data *= torch.inf
    results = engine.generate(rows)
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert "not finite" in str(results[1].error)
    assert np.array_equal(results[0].pixels, expected[0])
    assert np.array_equal(results[2].pixels, expected[2])


def test_an_embedding_is_remembered_with_the_scales_of_text_encoders(adapted, monkeypatch):
    text, seen = adapted._models.text.without_cache(), []
    run = text._encode_batch
    monkeypatch.setattr(text, "_encode_batch", lambda texts, chunks: (seen.append(texts), run(texts, chunks))[1])
    with torch.inference_mode():
        states = [text.encode(["a cat"], 1, [scales]).context for scales in ((), (("ink", 0.5),), (("ink", 1.0),), ())]
        unet_alone = text.encode(["a cat"], 1, [(("unet only", 2.0),)]).context
    assert len(seen) == 3
    assert torch.equal(states[0], states[3])
    assert torch.equal(states[0], unet_alone)
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_a_prompts_tags_give_scales_and_are_no_words(eps_model, two):
    engine = load(eps_model, syntax="a1111", **two)
    plain, tagged = row(1, ink=0.5), dataclasses.replace(row(1), prompt=f"{row(1).prompt}<lora:ink:0.5>")
    assert np.array_equal(pictures(engine, [tagged]), pictures(engine, [plain]))
    assert engine.generate([tagged])[0].prompt_tokens == engine.generate([plain])[0].prompt_tokens
    overridden = dataclasses.replace(tagged, loras=(("ink", 0.0),))
    assert np.array_equal(pictures(engine, [overridden]), pictures(engine, [row(1)]))
    words = load(eps_model, **two).generate([tagged])[0]
    assert words.prompt_tokens > engine.generate([tagged])[0].prompt_tokens, "read as text, unless the syntax is a1111"


def test_a_row_with_a_bad_scale_fails_alone(eps_model, two):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"loras": (("water", 1.0),)}, "LoRA 'water' is not loaded; there is clay, ink"),
        ({"loras": (("ink", 21.0),)}, "must be from -20 to 20"),
        ({"loras": (("ink", float("nan")),)}, "must be from -20 to 20"),
        ({"prompt": "a cat <lora:water:1>"}, "LoRA 'water' is not loaded"),
        ({"prompt": "a cat <lora:ink:0.5:0.7>"}, "is not <lora:NAME:SCALE>"),
        ({"negative_prompt": "<lora:ink:1>"}, "the negative prompt names a LoRA"),
    ]
    engine = load(eps_model, syntax="a1111", **two)
    first, *results = engine.generate(
        [row(1, ink=0.5), *(dataclasses.replace(row(1), **changes) for changes, _ in bad)]
    )
    assert first.status == "ok"
    for result, (_, reason) in zip(results, bad, strict=True):
        assert result.status == "failed"
        assert reason in str(result.error)


@pytest.mark.long
@torch.inference_mode()
def test_the_adapted_denoiser_compiles_whole(adapted):
    """With scales as inputs: a batch of others takes no other program, one with other LoRAs does."""
    models = adapted._models
    programs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        programs.append(module)
        return module.forward

    network = models.loras.around(models.denoiser)
    fast = compiled(network, backend)
    torch.manual_seed(0)
    channels, context = models.denoiser.config.in_channels, models.denoiser.config.context_dim
    inputs = torch.randn(2, channels, 8, 8), torch.tensor([10, 700]), torch.randn(2, 77, context)
    try:
        for scales in ({"ink": torch.tensor([0.5, 0.0])}, {"ink": torch.tensor([-1.0, 2.0])}, {}):
            given = as_conditions(scales)
            assert torch.allclose(fast(*inputs, **given), network(*inputs, **given), rtol=1e-4, atol=1e-4)
    finally:
        torch._dynamo.reset()
    assert len(programs) == 2


def test_a_retry_in_full_precision_keeps_the_scales(adapted):
    models = adapted._models
    with torch.inference_mode(), models.in_fp32() as wide:
        drawn = [next(iter(each.sample([row(1, ink=0.5)], 2))).pictures for each in (models, wide)]
    assert torch.equal(*drawn)


def damaged(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path, Terms], Path]:
    def write(path: Path, terms: Terms) -> Path:
        file = kohya(path, {"unet": terms})
        tensors = load_file(file)
        change(tensors)
        return saved(file, tensors)

    return write


def setting(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, tensor)


QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
BAD = {
    "a key of another model": (setting("lora_unet_x_to_q.lora_up.weight", torch.zeros(1)), "lora_unet_x_to_q.lora_up"),
    "a norm": (setting("lora_unet_conv_norm_out.lora_up.weight", torch.zeros(1)), "1 of its .* keys match nothing"),
    "DoRA": (setting(f"{QUERY}.dora_scale", torch.zeros(1)), "dora_scale"),
    "half a term": (lambda tensors: tensors.pop(f"{QUERY}.lora_up.weight"), "is no whole LoRA"),
    "another width": (setting(f"{QUERY}.lora_down.weight", torch.zeros(3, 32)), r"has shape \(3, 32\).*not for this"),
    "a vector": (setting(f"{QUERY}.lora_down.weight", torch.zeros(3)), "not for this model"),
    "a huge rank": (setting(f"{QUERY}.lora_down.weight", torch.zeros(4096, 64)), "a rank is from 1 to 2048"),
    "no rank": (setting(f"{QUERY}.lora_down.weight", torch.zeros(0, 64)), "a rank is from 1 to 2048"),
    "many alphas": (setting(f"{QUERY}.alpha", torch.zeros(3)), "not of one number"),
    "nothing": (lambda tensors: tensors.clear(), "0 of its 0 keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_with_the_key(name, folders, tmp_path):
    change, reason = BAD[name]
    terms = random_terms(UNet2DConditionModel.from_pretrained(folders("sd") / "unet"), 1)
    file = damaged(change)(tmp_path / "ink.safetensors", terms)
    spec = ModelSpec(model=str(folders("sd")), loras=(LoraSpec(name="ink", path=str(file)),))
    with pytest.raises(EngineError, match=reason) as caught:
        check_loras(spec)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(folders, tmp_path):
    terms = random_terms(UNet2DConditionModel.from_pretrained(folders("sd") / "unet"), 1)
    file = damaged(setting(f"{QUERY}.lora_down.weight", torch.full((3, 64), torch.nan)))(
        tmp_path / "a.safetensors", terms
    )
    with pytest.raises(EngineError, match=f"numbers of {QUERY}.* are not finite"):
        load(folders("sd"), ink=file)


def test_files_that_are_no_safetensors_or_lack_a_part_are_refused(folders, tmp_path):
    terms = random_terms(UNet2DConditionModel.from_pretrained(folders("sd") / "unet"), 1)
    peft_folder = write_peft(tmp_path / "peft", terms)
    (tmp_path / "ink.ckpt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((peft_folder / "adapter_model.safetensors").read_bytes()[:1000])
    shutil.copy(peft_folder / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    for place, reason in {
        "ink.ckpt": "is read from .safetensors alone",
        "empty": "holds no LoRA: looked for pytorch_lora_weights.safetensors, adapter_model.safetensors",
        "gone": "does not exist",
        "cut.safetensors": "cannot be read",
        "alone.safetensors": "whose alpha is in adapter_config.json",
    }.items():
        with pytest.raises(EngineError, match=reason):
            check_loras(ModelSpec(model=str(folders("sd")), loras=(LoraSpec(name="a", path=str(tmp_path / place)),)))
    for bad in ({"lora_alpha": "8"}, {"alpha_pattern": {"(a+)+$": 1}}, {"alpha_pattern": [1]}):
        (peft_folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1, **bad}))
        with pytest.raises(EngineError, match=r"adapter_config.json has (the )?alpha"):
            check_loras(ModelSpec(model=str(folders("sd")), loras=(LoraSpec(name="a", path=str(peft_folder)),)))


@pytest.mark.parametrize("names", [("a/b",), ("",), ("ink", "ink"), ("x" * 65,), tuple(map(str, range(17)))])
def test_names_of_loras_are_checked(names, eps_model, two):
    specs = tuple(LoraSpec(name=name, path=str(two["ink"])) for name in names)
    with pytest.raises(EngineError, match=r"must match|named twice|the limit is 16"):
        check_loras(ModelSpec(model=str(eps_model), loras=specs))


def test_every_file_of_a_lora_is_in_the_models_digest(folders, tmp_path):
    terms = random_terms(UNet2DConditionModel.from_pretrained(folders("sd") / "unet"), 1)
    place = write_peft(tmp_path / "peft", terms)
    described = describe_model(ModelSpec(model=str(folders("sd")), loras=(LoraSpec(name="ink", path=str(place)),)))
    names = ["loras/ink/adapter_config.json", "loras/ink/adapter_model.safetensors"]
    assert sorted(described.files.keys() - describe_model(folders("sd")).files.keys()) == names


def test_the_loras_that_ship_dye_the_embedded_models_pictures(tmp_path):
    """Made by `python -m training.lora`: each pulls every picture towards its own colour, the more the larger it is."""
    styles = {name: LORAS / f"{name}.safetensors" for name in ("sepia", "blueprint")}
    assert sum(path.stat().st_size for path in styles.values()) < 400_000
    engine = load(EMBEDDED_MODEL, batch_size=3, **styles)
    plain = GenerationRequest(
        prompt="a large black square in the center on a white background",
        seed=1,
        width=256,
        height=256,
        num_inference_steps=6,
        guidance_scale=4.0,
    )
    for name, warmer in (("sepia", 1), ("blueprint", -1)):
        drawn = pictures(engine, scaled([plain] * 3, 0.0, 0.5, 1.0, name=name)).astype(float)
        red_over_blue = warmer * (drawn[..., 0] - drawn[..., 2]).mean((1, 2))
        assert red_over_blue[0] + 5 < red_over_blue[1] < red_over_blue[2] - 5, (name, red_over_blue)
