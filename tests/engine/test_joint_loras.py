"""LoRAs of Stable Diffusion 3 and Flux, whose files have one matrix for several layers of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec
from latentmill.engine.families import flux
from latentmill.engine.latent_diffusion import load_latent_diffusion
from latentmill.engine.loading.layout import find_model
from latentmill.engine.loading.lora import check_loras, read_lora
from latentmill.engine.loading.lora_names import layer_names
from latentmill.engine.types import LoraSpec
from tests.engine.diffusers_models import write_flux, write_sd3
from tests.engine.families import assert_same_pictures
from tests.engine.loras import (
    ALPHA,
    RANK,
    STRENGTH,
    Terms,
    random_terms,
    saved,
    write_diffusers,
    write_kohya,
    write_peft,
)
from tests.engine.originals import joint_weights
from tests.engine.test_joint_transformers import load, pictures, reference, rows_for
from tests.engine.test_transformer_networks import FLUX_DEV, ours

pytestmark = [
    pytest.mark.long,
    # diffusers' schedulers make arrays of tensors in a way that NumPy 2 frowns upon.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SCALE = 0.7
WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd3": write_sd3,
    "sd35-medium": lambda folder: write_sd3(folder, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "flux-dev": write_flux,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("joint-loras")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """What each model draws without a LoRA."""
    return {name: pictures(load(folder), rows_for(name)) for name, folder in folders.items()}


def adapted(folder: Path, file: Path, **more: Any) -> Engine:
    return load(folder, loras=(LoraSpec(name="ink", path=str(file), **more),))


def scaled(rows: list[GenerationRequest], *scales: float) -> list[GenerationRequest]:
    given = scales * len(rows) if len(scales) == 1 else scales
    return [dataclasses.replace(row, loras=(("ink", scale),)) for row, scale in zip(rows, given, strict=True)]


def loaded(file: Path) -> Callable[[DiffusionPipeline], None]:
    def change(pipeline: DiffusionPipeline) -> None:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="ink")
        pipeline.set_adapters(["ink"], [SCALE])

    return change


def assert_drawn_alike(folder: Path, file: Path, plain: np.ndarray, change: Callable[[Any], None]) -> None:
    """Ours with the file, at its scale and at none, and the reference's pipeline after `change`."""
    rows = rows_for(folder.name)
    expected = reference(folder, rows, change=change)
    assert np.abs(expected.astype(int) - plain).mean() > 1, "the LoRA has no effect"
    engine = adapted(folder, file)
    assert_same_pictures(pictures(engine, scaled(rows, SCALE)), expected)
    assert np.array_equal(pictures(engine, scaled(rows, 0.0)), plain)


def networks_of(pipeline: DiffusionPipeline, *names: str) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in names}


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("sd3", False),
        ("sd3", True),
        ("sd35-medium", False),
        ("sd35-medium", True),
        ("flux-dev", False),
        ("flux-dev", True),
    ],
)
def test_files_of_diffusers_draw_the_references_pictures(name, every, folders, plain, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    encoders = ["text_encoder"] if name == "flux-dev" else ["text_encoder", "text_encoder_2"]
    terms = {
        component: random_terms(network, seed, convolutions=every and component == "transformer")
        for seed, (component, network) in enumerate(networks_of(pipeline, "transformer", *encoders).items())
    }
    metadata = None if every else {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    if metadata:
        terms = {"transformer": terms["transformer"]}
        metadata["transformer.target_modules"] = sorted(terms["transformer"])
    file = write_diffusers(tmp_path / "ink.safetensors", terms, metadata=metadata)
    assert_drawn_alike(folders[name], file, plain[name], loaded(file))


def random_pairs(shapes: dict[str, tuple[int, int]], prefix: str) -> dict[str, Tensor]:
    """A term with alpha for each of the matrices, by kohya's names."""
    torch.manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in shapes.items():
        key = f"{prefix}{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, inner) / inner**0.5
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, RANK) * STRENGTH
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def matrices(folder: Path) -> dict[str, Tensor]:
    """The transformer's weights that are matrices, by their original names, without `.weight`."""
    weights = joint_weights(folder, "", "", "transformer")
    return {key.removesuffix(".weight"): tensor for key, tensor in weights.items() if key.endswith(".weight")}


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if tensor.dim() == 2}


@pytest.mark.parametrize("name", ["sd3", "sd35-medium"])
def test_kohyas_files_for_sd3_are_what_they_add_to_the_authors_weights(name, folders, plain, tmp_path):
    """diffusers does not read them; it converts weights with the authors' names, to which the terms were added."""
    weights = joint_weights(folders[name], "", "", "transformer")
    tensors = random_pairs(shapes_of(matrices(folders[name])), "lora_unet_")
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_up.weight" in tensors
    assert "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight" in tensors
    for key in weights:
        spelled = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        if f"{spelled}.alpha" in tensors:
            up, down = tensors[f"{spelled}.lora_up.weight"], tensors[f"{spelled}.lora_down.weight"]
            weights[key] = weights[key] + SCALE * ALPHA / RANK * up @ down

    def add(pipeline: DiffusionPipeline) -> None:
        found = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
        found = {key: tensor for key, tensor in found.items() if tensor is not None}
        pipeline.transformer.load_state_dict(found)

    assert_drawn_alike(folders[name], saved(tmp_path / "ink.safetensors", tensors), plain[name], add)


def test_kohyas_files_for_flux_draw_the_references_pictures(folders, plain, tmp_path):
    """But for the first matrix of single blocks, whose rows diffusers takes to be those of the published width, and for
    layers outside of blocks, which its conversion names and its loader then passes over. Another test has all of them.
    """
    shapes = shapes_of(matrices(folders["flux-dev"]))
    shapes = {name: shape for name, shape in shapes.items() if "_blocks." in name and not name.endswith("linear1")}
    assert {"double_blocks.0.txt_attn.qkv", "single_blocks.0.linear2"} < shapes.keys()
    text = DiffusionPipeline.from_pretrained(folders["flux-dev"]).text_encoder
    encoder = {
        f"text_model.{name.removeprefix('text_model.')}": tuple(module.weight.shape)
        for name, module in text.named_modules()
        if ".self_attn." in name or ".mlp.fc" in name
    }
    tensors = random_pairs(shapes, "lora_unet_") | random_pairs(encoder, "lora_te1_")
    file = saved(tmp_path / "ink.safetensors", tensors)
    assert_drawn_alike(folders["flux-dev"], file, plain["flux-dev"], loaded(file))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_files_of_xlabs_draw_the_references_pictures(prefix, folders, plain, tmp_path):
    dim = 128
    shapes = {
        f"double_blocks.0.processor.{kind}_lora{stream}": (3 * dim if kind == "qkv" else dim, dim)
        for kind in ("qkv", "proj")
        for stream in "12"
    }
    shapes |= {"single_blocks.0.processor.qkv_lora": (3 * dim, dim)}
    shapes |= {"single_blocks.0.processor.proj_lora": (dim, 5 * dim)}
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in shapes.items():
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(RANK, inner) / inner**0.5
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(out, RANK) * STRENGTH
    file = saved(tmp_path / "ink.safetensors", tensors)
    assert_drawn_alike(folders["flux-dev"], file, plain["flux-dev"], loaded(file))


def test_every_name_of_kohya_for_flux_is_that_of_the_references_conversion_row_by_row(folders):
    """At the real width. Each layer has one name, and each row of a term comes where the reference puts it."""
    blueprint = find_model(ModelSpec(model=str(folders["flux-dev"]))).blueprint
    config = FLUX_DEV | {"num_layers": 2, "num_single_layers": 2}
    blueprint = dataclasses.replace(blueprint, denoiser=flux.FAMILY.denoiser.read(config, "config.json"))
    with torch.device("meta"):
        network = ours(flux.FAMILY, config)
    names = {
        name: layer
        for name, layer in layer_names(blueprint, {"transformer": network}).items()
        if name.startswith("lora_unet_") and name.removeprefix("lora_unet_") in ORIGINAL_FLUX
    }
    assert len(names) == len(ORIGINAL_FLUX)
    tensors = {}
    for name, layer in names.items():
        tensors[f"{name}.lora_up.weight"] = torch.arange(layer.shape[0], dtype=torch.float64)[:, None]
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, layer.shape[1], dtype=torch.float64)
    found = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    expected = {
        key.removeprefix("transformer.").removesuffix(".lora_B.weight"): tensor.flatten()
        for key, tensor in found.items()
        if ".lora_B." in key
    }
    assert expected.keys() == {path for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in names.items():
        for rows in layer.rows:
            own = torch.arange(rows.start, rows.stop, dtype=torch.float64)
            own = torch.cat(own.chunk(2)[::-1]) if rows.swapped else own
            assert torch.equal(own, expected.pop(rows.path)), (name, rows.path)


ORIGINAL_FLUX = {
    *("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1"),
    *(f"{part}_in_{side}_layer" for part in ("time", "vector", "guidance") for side in ("in", "out")),
    *(f"single_blocks_{n}_{layer}" for n in range(2) for layer in ("linear1", "linear2", "modulation_lin")),
    *(
        f"double_blocks_{n}_{stream}_{layer}"
        for n in range(2)
        for stream in ("img", "txt")
        for layer in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    ),
}


@pytest.mark.parametrize(
    ("name", "component", "form"),
    [
        ("flux-dev", "text_encoder_2", "kohya"),
        ("flux-dev", "text_encoder_2", "diffusers"),
        ("sd3", "text_encoder_3", "kohya"),
        ("sd3", "text_encoder_3", "web UIs"),
    ],
)
def test_t5_takes_loras_as_peft_gives_it_them(name, component, form, folders, plain, tmp_path):
    """diffusers passes over them; kohya's trainer numbers T5 3 wherever it stands."""
    network = getattr(DiffusionPipeline.from_pretrained(folders[name]), component)
    terms = {
        path: pair
        for path, pair in random_terms(network, 6, convolutions=True).items()
        if "relative" not in path and "lm_head" not in path
    }
    assert any(path.endswith("DenseReluDense.wo") for path in terms)

    def change(pipeline: DiffusionPipeline) -> None:
        config = LoraConfig(r=RANK, lora_alpha=SCALE * ALPHA, target_modules=sorted(terms))
        state = {
            f"{path}.{part}.weight": tensor
            for path, pair in terms.items()
            for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
        }
        getattr(pipeline, component).load_adapter(peft_config=config, adapter_state_dict=state, adapter_name="ink")

    spelled = {
        "kohya": lambda path: f"lora_te3_{path.replace('.', '_')}",
        "diffusers": lambda path: f"{component}.{path}",
        "web UIs": lambda path: f"text_encoders.t5xxl.transformer.{path}",
    }[form]
    tensors = {
        f"{spelled(path)}.{part}": tensor
        for path, (down, up) in terms.items()
        for part, tensor in (
            ("lora_down.weight", down),
            ("lora_up.weight", up),
            ("alpha", torch.tensor(ALPHA)),
        )
    }
    assert_drawn_alike(folders[name], saved(tmp_path / "ink.safetensors", tensors), plain[name], change)


@pytest.mark.long
def test_t5_takes_loras_in_half_precision(folders, tmp_path):
    """Its last layers work in fp32, whatever the dtype of weights and terms."""
    network = DiffusionPipeline.from_pretrained(folders["sd3"]).text_encoder_3
    file = write_diffusers(tmp_path / "ink.safetensors", {"text_encoder_3": terms_of_wo(network)})
    spec = ModelSpec(model=str(folders["sd3"]), loras=(LoraSpec(name="ink", path=str(file)),))
    rows = scaled(rows_for("sd3", steps=1)[:2], SCALE)
    drawn = []
    for dtype in (torch.float16, torch.float32):
        models = load_latent_diffusion(find_model(spec), spec, dtype, torch.device("cpu"), 2)
        with torch.inference_mode():
            (part,) = models.sample(rows, 2)
        assert part.finite.all()
        drawn.append(part.pictures)
    assert (drawn[0] - drawn[1]).abs().mean() < 0.01


def terms_of_wo(network: nn.Module) -> Terms:
    return {path: pair for path, pair in random_terms(network, 6, convolutions=True).items() if path.endswith(".wo")}


def test_every_spelling_of_one_lora_gives_the_same_terms(folders, tmp_path):
    layout = find_model(ModelSpec(model=str(folders["flux-dev"])))
    terms = random_terms(DiffusionPipeline.from_pretrained(folders["flux-dev"]).transformer, 1, convolutions=True)
    metadata = {"transformer.lora_alpha": ALPHA}
    named = {
        prefix: saved(
            tmp_path / f"{prefix}.safetensors",
            {
                f"{prefix}_{path.replace('.', '_')}.{part}": tensor
                for path, (down, up) in terms.items()
                for part, tensor in (
                    ("lora_down.weight", down),
                    ("lora_up.weight", up),
                    ("alpha", torch.tensor(ALPHA)),
                )
            },
        )
        for prefix in ("lora_transformer", "lora_unet")
    }
    files = [
        write_diffusers(tmp_path / "diffusers.safetensors", {"transformer": terms}, metadata=metadata),
        write_peft(tmp_path / "peft", terms),
        *named.values(),
    ]
    found = [read_lora(find_model(with_lora(folders["flux-dev"], file)).loras["ink"], layout) for file in files]
    for other in found[1:]:
        assert other["transformer"].keys() == found[0]["transformer"].keys() == terms.keys()
        for path, term in found[0]["transformer"].items():
            assert torch.equal(term.down, other["transformer"][path].down)
            assert torch.equal(term.up, other["transformer"][path].up)


def test_kohya_numbers_the_encoders_of_sd3(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["sd3"])
    layout = find_model(ModelSpec(model=str(folders["sd3"])))
    components = ("text_encoder", "text_encoder_2")
    terms = {
        name: random_terms(network, seed)
        for seed, (name, network) in enumerate(networks_of(pipeline, *components).items())
    }
    numbered = {"lora_te1": terms["text_encoder"], "lora_te2": terms["text_encoder_2"]}
    files = (
        write_kohya(tmp_path / "kohya.safetensors", numbered, alpha=None),
        write_diffusers(tmp_path / "diffusers.safetensors", terms),
    )
    first, second = (read_lora(find_model(with_lora(folders["sd3"], file)).loras["ink"], layout) for file in files)
    assert first.keys() == second.keys() == set(components)
    for name in components:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(term.up, second[name][path].up) for path, term in first[name].items())


def with_lora(folder: Path, file: Path) -> ModelSpec:
    return ModelSpec(model=str(folder), loras=(LoraSpec(name="ink", path=str(file)),))


@pytest.fixture
def fused(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A LoRA for every matrix of each model, by kohya's names."""
    return {
        name: saved(tmp_path / f"{name}.safetensors", random_pairs(shapes_of(matrices(folder)), "lora_unet_"))
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_rows_of_other_scales_share_a_batch_and_keep_their_bits(name, folders, fused):
    engine = adapted(folders[name], fused[name])
    rows = scaled(rows_for(name, steps=1), 0.0, 0.5, -1.0, 0.5)
    together = pictures(engine, rows)
    assert len({picture.tobytes() for picture in together}) == len(rows)
    for row, picture in zip(rows, together, strict=True):
        assert np.array_equal(pictures(engine, [row])[0], picture)
    assert np.array_equal(pictures(engine, rows[::-1])[::-1], together)


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_merged_into_the_weights_it_draws_nearly_the_same(name, folders, fused):
    rows = scaled(rows_for(name), SCALE)
    beside = pictures(adapted(folders[name], fused[name]), rows)
    assert_same_pictures(pictures(adapted(folders[name], fused[name], merged=SCALE), rows), beside)


def test_loha_and_lokr_of_a_fused_matrix_have_its_rows(folders, tmp_path):
    """The whole difference is computed and parted; of low rank, it is what the factors say."""
    dim, name = 128, "lora_unet_single_blocks_0_linear1"
    torch.manual_seed(7)
    factors = {f"hada_w{side}_{end}": torch.randn(*shape) for side in "12" for end, shape in loha_shapes(dim).items()}
    loha = saved(tmp_path / "loha.safetensors", {f"{name}.{key}": tensor for key, tensor in factors.items()})
    left, right = torch.randn(7, 2), torch.randn(dim, dim // 2)
    lokr = saved(tmp_path / "lokr.safetensors", {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right})
    whole = {
        loha: (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"]),
        lokr: torch.kron(left, right),
    }
    layout = find_model(ModelSpec(model=str(folders["flux-dev"])))
    for file, expected in whole.items():
        lora = find_model(with_lora(folders["flux-dev"], file)).loras["ink"]
        terms = read_lora(lora, layout)["transformer"]
        block = "single_transformer_blocks.0."
        parts = [terms[f"{block}{layer}"].down for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        assert torch.allclose(torch.cat(parts), expected, atol=1e-5)


def loha_shapes(dim: int) -> dict[str, tuple[int, int]]:
    return {"a": (7 * dim, RANK), "b": (RANK, dim)}


UNKNOWN = {
    "a block that is not there": ("lora_unet_double_blocks_9_img_attn_qkv.lora_up.weight", "1 of its .* keys"),
    "a norm": ("transformer.transformer_blocks.0.attn.norm_q.lora_A.weight", "norm_q.lora_A.weight"),
    "a difference of weights": ("lora_unet_img_in.diff", "img_in.diff"),
    "a bias": ("transformer.proj_out.lora_B.bias", "proj_out.lora_B.bias"),
    "an embedding": ("lora_te1_text_model_embeddings_position_embedding.lora_up.weight", "position_embedding"),
    "an encoder that Flux has not": ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "lora_te2_text"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_key_that_matches_nothing_is_named(what, folders, fused, tmp_path):
    key, reason = UNKNOWN[what]
    file = saved(tmp_path / "bad.safetensors", {**load_file(fused["flux-dev"]), key: torch.zeros(1)})
    with pytest.raises(EngineError, match=rf"match nothing in the model \(flux\), first '?{key[:20]}") as caught:
        check_loras(with_lora(folders["flux-dev"], file))
    assert reason.partition(" ")[0] in str(caught.value)


def test_terms_of_a_fused_matrix_must_have_its_rows_and_no_other_for_a_part(folders, fused, tmp_path):
    tensors = load_file(fused["flux-dev"])
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
    short = saved(tmp_path / "short.safetensors", {**tensors, key: torch.zeros(128, RANK)})
    with pytest.raises(EngineError, match=rf"{key} has shape \(128, 3\), transformer asks for \(384, 3\)"):
        check_loras(with_lora(folders["flux-dev"], short))
    part = "transformer.transformer_blocks.0.attn.to_k.lora_{}.weight"
    more = {part.format("A"): torch.zeros(1, 128), part.format("B"): torch.zeros(128, 1)}
    both = saved(tmp_path / "both.safetensors", {**tensors, **more})
    with pytest.raises(EngineError, match=r"qkv.* and transformer.*to_k.*, which are of the same layer; use one"):
        check_loras(with_lora(folders["flux-dev"], both))


def test_a_lora_for_t5_needs_a_model_with_it(folders, tmp_path):
    bare = write_sd3(tmp_path / "bare", has_t5=False)
    network = DiffusionPipeline.from_pretrained(folders["sd3"]).text_encoder_3
    file = write_diffusers(tmp_path / "ink.safetensors", {"text_encoder_3": terms_of_wo(network)})
    with pytest.raises(EngineError, match=r"match nothing .*first .*text_encoder_3"):
        check_loras(with_lora(bare, file))
