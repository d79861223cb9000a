"""The original's configs: each key that changes the picture is honoured as there, or refused by name.

The judge is the original's script around the reference library's networks (see original_script.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from latentmill.engine import EngineError, ModelDescription, describe_model
from latentmill.engine.loading.describe import describe_layout
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.single_file import recognise
from latentmill.jobs.errors import UsageError
from latentmill.jobs.txt2img.config import CompVisConfig, find_config
from latentmill.jobs.txt2img.config_keys import SECTIONS
from latentmill.jobs.txt2img.drawing import Txt2ImgPlan, load_engine
from latentmill.jobs.txt2img.options import DEFAULT_CONFIG, LAION_CONFIG
from tests.engine.families import write_ldm
from tests.engine.originals import original_weights, write_ckpt
from tests.engine.test_original_names import PUBLISHED, Listing, original_shapes
from tests.original_script import (
    SCHEDULE,
    SMALL,
    assert_the_originals,
    load_reference,
    originals_pictures,
    our_pictures,
    own_schedule,
    plan,
    small_config,
    write_small_sd1,
)

pytestmark = pytest.mark.slow

FIRST_STAGE, COND_STAGE = "first_stage_config.params", "cond_stage_config.params"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def without_schedule(sd1: Path) -> Path:
    """The same model in a file that does not hold its schedule, as conversions leave it out."""
    return write_ckpt(sd1 / "folder", sd1 / "bare.ckpt", changes={"alphas_cumprod": None})


@pytest.fixture(scope="module")
def averaged(sd1: Path) -> tuple[Path, StableDiffusionPipeline]:
    """A checkpoint with a running average as training leaves it, and the reference with the average for weights."""
    pipeline = load_reference(sd1 / "folder")
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.add_(0.3 * weight.std(correction=0) * torch.randn_like(weight))
    pipeline.save_pretrained(sd1 / "averaged")
    shadows = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): weight
        for key, weight in original_weights(sd1 / "averaged").items()
        if key.startswith("model.diffusion_model.")
    }
    changes = {
        "alphas_cumprod": own_schedule(),
        "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32),
        **shadows,
    }
    return write_ckpt(sd1 / "folder", sd1 / "averaged.ckpt", changes=changes), pipeline


LEFT_OUT = object()


def edited(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values by dotted paths below model.params."""
    content = copy.deepcopy(content)
    for path, value in changes.items():
        *parents, key = path.split(".")
        part = content["model"]["params"]
        for parent in parents:
            part = part.setdefault(parent, {})
        if value is LEFT_OUT:
            part.pop(key)
        else:
            part[key] = value
    return content


def drawing(sd1: Path, changes: Mapping[str, Any], *flags: object, ckpt: Path | None = None) -> Txt2ImgPlan:
    content = edited(yaml.safe_load((sd1 / "config.yaml").read_text()), changes)
    (sd1 / "edited.yaml").write_text(yaml.safe_dump(content))
    checkpoint = ckpt or sd1 / "model.ckpt"
    return plan("--ckpt", checkpoint, "--config", sd1 / "edited.yaml", "--ddim_steps", 4, *SMALL, *flags)


# Honoured


@pytest.mark.parametrize("value", [True, LEFT_OUT], ids=["true", "left-out"])
@pytest.mark.slow
def test_the_running_average_draws_unless_the_config_says_otherwise(sd1, averaged, value):
    checkpoint, pipeline = averaged
    found = our_pictures(drawing(sd1, {"use_ema": value}, ckpt=checkpoint))
    assert_the_originals(found, originals_pictures(pipeline))


@pytest.mark.slow
def test_the_weights_themselves_draw_where_the_config_says_so(sd1, averaged):
    found = our_pictures(drawing(sd1, {"use_ema": False}, ckpt=averaged[0]))
    assert_the_originals(found, originals_pictures(sd1 / "folder"))


def test_an_average_that_the_file_does_not_hold_is_refused(sd1, averaged, tmp_path):
    bare = write_ckpt(
        sd1 / "folder", tmp_path / "bare.ckpt", changes={"model_ema.diffusion_modeltime_embed0weight": None}
    )
    with pytest.raises(UsageError, match=r"model_ema.\*.*use_ema is true.*give use_ema: false") as refused:
        drawing(sd1, {"use_ema": LEFT_OUT}, ckpt=bare)
    assert "\n" not in str(refused.value)
    # One buffer of it, as a file that was cut down by hand has.
    with pytest.raises(EngineError, match=r"no whole running average of its weights: \d+ keys missing .*model_ema"):
        load_engine(drawing(sd1, {"use_ema": True}))


def cosine(total: int = 1000, s: float = 8e-3) -> np.ndarray:
    power = np.cos((np.arange(total + 1) / total + s) / (1 + s) * np.pi / 2) ** 2
    return np.cumprod(1 - np.clip(1 - power[1:] / power[:-1], 0, 0.999))


def between(start: float, end: float, total: int = 1000, exponent: float = 1.0) -> np.ndarray:
    return np.cumprod(1 - np.linspace(start**exponent, end**exponent, total) ** (1 / exponent))


@pytest.mark.parametrize(
    ("changes", "powers"),
    [
        ({}, SCHEDULE),
        ({"linear_start": LEFT_OUT, "linear_end": LEFT_OUT}, between(1e-4, 2e-2, exponent=0.5)),
        ({"linear_start": "15e-4"}, between(0.0015, 0.012, exponent=0.5)),
        ({"timesteps": 500}, between(0.00085, 0.012, 500, exponent=0.5)),
        ({"beta_schedule": "sqrt_linear"}, between(0.00085, 0.012)),
        (
            {"beta_schedule": "sqrt", "linear_start": 1e-8, "linear_end": 1e-4},
            np.cumprod(1 - np.linspace(1e-8, 1e-4, 1000) ** 0.5),
        ),
        ({"beta_schedule": "cosine"}, cosine()),
        ({"beta_schedule": "cosine", "cosine_s": 0.05}, cosine(s=0.05)),
    ],
)
@pytest.mark.slow
def test_the_configs_schedule_is_the_originals_where_the_file_has_none(sd1, without_schedule, changes, powers):
    found = our_pictures(drawing(sd1, changes, "--ddim_eta", 0.5, ckpt=without_schedule))
    assert_the_originals(found, originals_pictures(sd1 / "folder", powers=powers, eta=0.5))


@pytest.mark.slow
def test_the_files_own_schedule_overrules_the_config(sd1):
    found = our_pictures(drawing(sd1, {"beta_schedule": "cosine", "linear_start": LEFT_OUT}))
    assert_the_originals(found, originals_pictures(sd1 / "folder"))


@pytest.mark.parametrize("flags", [[], ["--plms"]], ids=["ddim", "plms"])
@pytest.mark.slow
def test_a_schedule_that_was_saved_in_float16_is_taken_as_it_was_rounded(sd1, flags):
    changes = {"alphas_cumprod": own_schedule()}
    half = write_ckpt(sd1 / "folder", sd1 / "half.ckpt", torch.float16, changes=changes)
    rounded = own_schedule().half().double().numpy()
    pipeline = load_reference(sd1 / "folder")
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.half().float()
    planned = drawing(sd1, {}, *flags, ckpt=half)
    schedule = load_engine(planned)._models.schedule.alphas_cumprod.double().numpy()
    assert np.abs(schedule / rounded - 1).max() < 1e-5 < np.abs(SCHEDULE / rounded - 1).max() / 10
    assert_the_originals(our_pictures(planned), originals_pictures(pipeline, plms=bool(flags), powers=rounded))


@pytest.mark.parametrize(("value", "expected"), [(LEFT_OUT, 1.0), (0.5, 0.5)], ids=["left-out", "half"])
@pytest.mark.slow
def test_the_scale_of_latents_is_the_configs_and_1_where_it_says_nothing(sd1, value, expected):
    found = our_pictures(drawing(sd1, {"scale_factor": value}))
    assert_the_originals(found, originals_pictures(sd1 / "folder", scale_factor=expected))


# Refused


@pytest.mark.parametrize(
    ("powers", "message"),
    [
        (np.random.default_rng(0).random(1000), "does not fall from 1 towards 0"),
        (np.full(1000, np.nan), "does not fall from 1 towards 0"),
        (np.concatenate([np.ones(2), SCHEDULE[2:]]), "does not fall from 1 towards 0"),
        (np.concatenate([SCHEDULE[:900], np.zeros(100)]), "does not fall from 1 towards 0"),
        (SCHEDULE[:500], r"alphas_cumprod of shape .500,., but timesteps is 1000"),
    ],
    ids=["random", "nan", "no-noise", "no-signal", "short"],
)
def test_a_schedule_that_cannot_be_sampled_with_is_refused(sd1, tmp_path, powers, message):
    changes = {"alphas_cumprod": own_schedule(powers)}
    broken = write_ckpt(sd1 / "folder", tmp_path / "broken.ckpt", changes=changes)
    with pytest.raises(UsageError, match=message):
        drawing(sd1, {}, ckpt=broken)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("beta_schedule", "quadratic", "it must be linear, cosine, sqrt_linear, sqrt"),
        ("beta_schedule", None, "it must be linear"),
        ("use_ema", "false", "it must be true, false"),
        ("use_ema", None, "it must be true, false"),
        ("parameterization", None, "it must be eps, v, x0"),
        ("linear_start", "little", "it must be a number"),
        ("linear_start", -1.0, "linear_start is -1.0; it must be 0 or more"),
        ("linear_end", True, "it must be a number"),
        ("timesteps", 10**12, "timesteps is 1000000000000; it must be 3 to 100000"),
        ("timesteps", 999.5, "it must be a whole number"),
        ("scale_factor", 0, "scale_factor is 0.0; it must be a number other than 0"),
        ("scale_factor", float("nan"), "it must be a number"),
        ("scale_by_std", True, "which this version does not draw with; built is False"),
        ("given_betas", [0.1], "built is none"),
        ("conditioning_key", "concat", "built is 'crossattn'"),
        ("cond_stage_forward", "encode_all", "built is none"),
        ("ckpt_path", "other.ckpt", "built is none"),
        ("personalization_config", {}, "which is no key of the original's that is known here"),
        ("unet_config.params.use_scale_shift_norm", True, "built is False"),
        ("unet_config.params.resblock_updown", True, "built is False"),
        ("unet_config.params.conv_resample", False, "built is True"),
        ("unet_config.params.num_classes", 1000, "built is none"),
        ("unet_config.params.n_embed", 8192, "built is none"),
        ("unet_config.params.dims", 3, "built is 2"),
        ("unet_config.params.use_spatial_transformer", False, "built is True"),
        ("unet_config.params.heads", 8, "which is no key of the original's that is known here"),
        (f"{FIRST_STAGE}.ddconfig.tanh_out", True, "built is False"),
        (f"{FIRST_STAGE}.ddconfig.give_pre_end", True, "built is False"),
        (f"{FIRST_STAGE}.ddconfig.attn_type", "linear", "built is 'vanilla' or 'vanilla-xformers'"),
        (f"{FIRST_STAGE}.ddconfig.resamp_with_conv", False, "built is True"),
        ("first_stage_config.target", "ldm.models.autoencoder.VQModel", "known are AutoencoderKL, VQModelInterface"),
        ("cond_stage_config", "__is_first_stage__", "it must be a mapping"),
        (f"{COND_STAGE}.use_tokenizer", False, "built is True"),
        (f"{COND_STAGE}.skip", 2, "which is no key of the original's that is known here"),
        # What the checkpoint has otherwise.
        ("unet_config.params.num_heads", 4, "num_heads: 4, but .* has 8"),
        ("unet_config.params.num_head_channels", 32, "num_head_channels: 32, but"),
        ("unet_config.params.transformer_depth", 2, "transformer_depth: 2, but .* has 1"),
        ("unet_config.params.channel_mult", LEFT_OUT, r"channel_mult: \[1, 2, 4, 8\] .the original's default"),
        ("unet_config.params.attention_resolutions", [4, 2], r"attention_resolutions: \[4, 2\], but"),
        ("unet_config.params.use_linear_in_transformer", True, "use_linear_in_transformer: True, but .* has False"),
        ("first_stage_config.target", "ldm.models.autoencoder.VQModelInterface", "has 'AutoencoderKL'"),
        (f"{COND_STAGE}.layer", "hidden", "layer: 'hidden', but"),
        (f"{COND_STAGE}.max_length", 40, "max_length: 40, but .* has 77"),
    ],
)
def test_what_changes_the_picture_and_is_not_built_is_refused_by_name(sd1, path, value, message):
    with pytest.raises(UsageError, match=message) as refused:
        drawing(sd1, {path: value})
    assert path.split(".")[-1] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_attention_that_the_first_stage_does_not_have_is_refused(sd1):
    ddconfig = f"{FIRST_STAGE}.ddconfig"
    with pytest.raises(UsageError, match=r"attn_resolutions: \[64, 7\], but"):
        drawing(sd1, {f"{ddconfig}.resolution": 256, f"{ddconfig}.attn_resolutions": [64, 7]})
    # 256, 128 and 64 are the sides that there are: no level has this one.
    assert drawing(sd1, {f"{ddconfig}.resolution": 256, f"{ddconfig}.attn_resolutions": [16]})


def test_the_embedder_of_another_model_is_refused(sd1):
    text = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"tokenizer": str(sd1 / "folder")}}
    with pytest.raises(UsageError, match=r"BERTEmbedder', but .* has 'FrozenCLIPEmbedder'"):
        drawing(sd1, {"cond_stage_config": text})


def test_what_changes_no_picture_may_say_anything(sd1):
    """Every key of this kind, and those that are compared, written in another order."""
    changes: dict[str, Any] = {
        "unet_config.params.attention_resolutions": [1, 2, 4],
        f"{FIRST_STAGE}.ddconfig.attn_resolutions": [],
        f"{FIRST_STAGE}.ddconfig.resolution": 256,
        f"{FIRST_STAGE}.ddconfig.unheard_of": "which the original's decoder passes over",
        "scheduler_config": None,
    }
    for section in SECTIONS:
        below = section.path.removeprefix("model.params").removeprefix(".")
        changes |= {f"{below}.{key}".removeprefix("."): "anything" for key in section.inert}
    assert drawing(sd1, changes).model.family == "stable-diffusion"


def test_every_fact_that_is_compared_is_a_key_of_a_section(sd1, tmp_path):
    known = {f"{section.path}.{key}" for section in SECTIONS for key in section.read}
    ldm = write_ckpt(write_ldm(tmp_path / "ldm"), tmp_path / "ldm.ckpt", changes={"alphas_cumprod": None})
    for checkpoint, tokenizer in ((sd1 / "model.ckpt", sd1 / "folder"), (ldm, tmp_path / "ldm")):
        config = CompVisConfig(Path("config.yaml"), edited(small_config(), {f"{COND_STAGE}.tokenizer": str(tokenizer)}))
        facts = {path for path, *_ in config._facts(describe_model(config.model_spec(str(checkpoint))))}
        assert facts <= known
    for section in SECTIONS:
        assert not section.read & section.inert
        assert not section.only.keys() & (section.read | section.inert)


def published(name: str) -> ModelDescription:
    """A published checkpoint, of which only names and shapes are there."""
    model = PUBLISHED[name]
    listing = Listing({**original_shapes(model.blueprint), **model.ignored})
    blueprint = recognise(listing, model.prediction_type)
    return describe_layout(
        ModelLayout(path=listing.path, blueprint=blueprint, single_file=True, weights={}, tokenizers=(), files={})
    )


@pytest.mark.parametrize(("name", "checkpoint"), [(DEFAULT_CONFIG, "sd1"), (LAION_CONFIG, "ldm-kl")])
def test_the_shipped_configs_fit_the_published_checkpoints(name, checkpoint):
    CompVisConfig.read(find_config(name)).check(published(checkpoint))


def test_open_clip_is_read_at_its_penultimate_layer_or_not_at_all():
    """The original's default is the last layer, which the published models were not trained on."""
    unet = {"params": {"channel_mult": [1, 2, 4, 4], "use_linear_in_transformer": True}}
    first = {"params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
    text = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"layer": "penultimate"}}
    params = {"unet_config": unet, "first_stage_config": first, "cond_stage_config": text}
    config = CompVisConfig(Path("v2.yaml"), {"model": {"params": params}})
    config.check(published("sd2"))
    text["params"] = {}
    with pytest.raises(UsageError, match=r"layer: 'last' .the original's default.*has 'penultimate'"):
        config.check(published("sd2"))


# As a file


def test_a_config_that_belongs_to_another_checkpoint_is_refused(sd1):
    config = yaml.safe_load((sd1 / "config.yaml").read_text())
    config["model"]["params"]["unet_config"]["params"]["model_channels"] = 320
    (sd1 / "other.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError, match=r"model_channels: 320, but .*model.ckpt has 32: they are not of one model"):
        plan("--ckpt", sd1 / "model.ckpt", "--config", sd1 / "other.yaml", "--f", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {target: os.system, params: {unet_config: {params: {}}}}", "model.target: 'os.system'; known are"),
        (
            "model: {params: {parameterization: w, unet_config: {params: {}}}}",
            "parameterization is 'w'; it must be eps",
        ),
        ("model: [", "cannot be read as YAML"),
        ("date: 2026-02-30", "cannot be read as YAML"),
        ("!!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("data: {}", "it is no config of a model"),
    ],
)
def test_a_config_is_read_and_never_run(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        CompVisConfig.read(tmp_path / "config.yaml").model_spec("model.ckpt")


@pytest.mark.parametrize(("name", "context", "image_size"), [(DEFAULT_CONFIG, 768, 64), (LAION_CONFIG, 1280, 32)])
def test_the_shipped_configs_hold_the_published_numbers(name, context, image_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they are found in the package, too
    config = CompVisConfig.read(find_config(name))
    expected = {
        "image_size": image_size,
        "timesteps": 1000,
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "scale_factor": 0.18215,
        "unet_config.params.model_channels": 320,
        "unet_config.params.channel_mult": [1, 2, 4, 4],
        "unet_config.params.attention_resolutions": [4, 2, 1],
        "unet_config.params.num_heads": 8,
        "unet_config.params.context_dim": context,
        "first_stage_config.params.ddconfig.ch": 128,
        "first_stage_config.params.ddconfig.ch_mult": [1, 2, 4, 4],
    }
    assert {path: config.get(f"model.params.{path}") for path in expected} == expected


def test_a_velocity_config_is_one(sd1):
    config = CompVisConfig.read(sd1 / "config.yaml")
    config.content["model"]["params"]["parameterization"] = "v"
    spec = config.model_spec("model.ckpt")
    assert (spec.prediction_type, spec.timestep_spacing) == ("v_prediction", "original")
    assert spec.tokenizer == str(sd1 / "folder")
