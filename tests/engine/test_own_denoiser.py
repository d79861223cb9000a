"""A family with a denoiser of its own: declared in one place, loaded strictly, and sampled as any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, describe_model
from latentmill.engine.families import table
from latentmill.engine.families.family import NetworkSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    in_channels: int
    out_channels: int
    context_dim: int
    pooled_dim: int | None
    sample_size: int
    patch_size: int = 1
    side_limit: int | None = None
    distilled_guidance: bool = False


class Average(nn.Module):
    """No U-Net: each cell's features and the mean of the prompt's tokens through one layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mix = nn.Linear(config.in_channels + config.context_dim + 1, config.out_channels)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        beside = torch.cat([context.mean(dim=1), timesteps[:, None] / 1000], dim=1)[:, :, None, None]
        features = torch.cat([latents, beside.expand(-1, -1, height, width)], dim=1)
        return self.mix(features.movedim(1, -1)).movedim(-1, 1)


@pytest.fixture
def folder(eps_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = NetworkSpec(component="transformer", read=lambda config, _: Config(**config), build=Average)
    own = dataclasses.replace(table.PIPELINES["StableDiffusionPipeline"], name="average", denoiser=spec)
    monkeypatch.setitem(table.PIPELINES, "AveragePipeline", own)
    model = Path(shutil.copytree(eps_model, tmp_path / "model"))
    shutil.rmtree(model / "unet")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "AveragePipeline"}))
    (model / "transformer").mkdir()
    write_config(model, context_dim=32)
    torch.manual_seed(0)
    save_weights(
        model, Average(spec.read(json.loads((model / "transformer/config.json").read_text()), "")).state_dict()
    )
    return model


def write_config(model: Path, *, context_dim: int) -> None:
    config = {"in_channels": 4, "out_channels": 4, "context_dim": context_dim, "pooled_dim": None, "sample_size": 16}
    (model / "transformer/config.json").write_text(json.dumps(config))


def save_weights(model: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, model / "transformer/diffusion_pytorch_model.safetensors")


def load(model: Path) -> Engine:
    return Engine.load(ModelSpec(model=str(model), safety="none"), device="cpu", dtype="float32", batch_size=2)


def request(prompt: str) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, seed=1, width=64, height=64, num_inference_steps=3, guidance_scale=5.0)


def test_it_is_described_loaded_and_draws_what_its_prompt_says(folder: Path):
    described = describe_model(folder)
    assert (described.family, described.default_size) == ("average", (128, 128))
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= described.paths.keys()
    one, other = load(folder).generate([request("a dog"), request("a cat")])
    assert (one.error, other.error) == (None, None)
    assert (one.pixels != other.pixels).any()


def test_its_keys_are_matched_strictly(folder: Path):
    save_weights(folder, {"mix.weight": torch.zeros(4, 37), "other": torch.zeros(1)})
    with pytest.raises(
        EngineError, match=r"1 keys missing \(first: \['mix.bias'\]\), 1 unexpected \(first: \['other'\]"
    ):
        load(folder)


def test_a_part_that_does_not_fit_it_is_refused(folder: Path):
    write_config(folder, context_dim=48)
    with pytest.raises(EngineError, match="32 wide, the denoiser's attention expects 48"):
        describe_model(folder)
