"""The recipe's own arithmetic: folding, timesteps, averages, checkpoints, tokenizer, card."""

import json

import numpy as np
import pytest
import torch

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import architecture, autoencoder, card, diffusion, icons, scenes, tokenizer
from training.common import RunningAverage, learning_rate, load_checkpoint, save_checkpoint, to_pictures, to_tensor
from training.export import EMBEDDED, SIZE_LIMIT
from training.latents import fold


@pytest.fixture
def first_stage():
    torch.manual_seed(0)
    model = AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).eval()
    autoencoder.begin_linear(model)
    return model


@torch.inference_mode()
def test_folding_moves_the_latents_and_leaves_the_pictures(first_stage):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, deviation = torch.linspace(-2, 2, 8), torch.linspace(0.5, 3, 8)
    before = first_stage.encode(pixels)
    picture = first_stage.decode(before.mean)
    first_stage.load_state_dict(fold(first_stage.state_dict(), mean, deviation))
    after = first_stage.encode(pixels)
    torch.testing.assert_close(after.mean, (before.mean - mean[:, None, None]) / deviation[:, None, None])
    torch.testing.assert_close(after.logvar, before.logvar - 2 * deviation.log()[:, None, None])
    torch.testing.assert_close(first_stage.decode(after.mean), picture, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_first_stage_begins_with_colours_that_differ(first_stage):
    plain = [np.full((64, 64, 3), colour, dtype=np.uint8) for colour in scenes.COLOURS.values()]
    latents = first_stage.encode(to_tensor(plain)).mean.mean(dim=(2, 3))
    assert torch.pdist(latents).min() > 0.05


def test_timesteps_cover_the_schedule_and_favour_noise():
    timesteps = diffusion.stratified_timesteps(100, 1000, torch.Generator().manual_seed(0))
    assert timesteps.min() < 20
    assert timesteps.max() > 970
    assert int((timesteps >= 400).sum()) in range(74, 77)


def test_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(progress, 1.0) for progress in (0.0, 0.01, 0.3, 0.6, 0.8, 1.0)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == 1.0
    assert rates[3] > rates[4] > rates[5] > 0


def test_the_running_average_follows():
    layer = torch.nn.Linear(2, 2)
    average = RunningAverage(layer, 0.5)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for _ in range(40):
        average.update(layer)
    torch.testing.assert_close(average.values["weight"], layer.weight.detach())


def test_checkpoints_replace_each_other(tmp_path):
    path = tmp_path / "stage.pt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage.pt"]


def test_pictures_survive_the_way_to_tensors_and_back():
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_pictures(to_tensor([picture]))[0], picture)


def test_the_shipped_tokenizer_knows_every_word_of_the_captions():
    words = tokenizer.load(EMBEDDED / "tokenizer")
    rng = np.random.default_rng(1)
    texts = [scenes.caption(scene, rng) for scene in scenes.all_scenes()[::50]]
    texts += [icons.caption(icon, rng) for icon in icons.draw_icons(list(icons.NAMES), 192, rng)]
    for text in texts:
        spelled = text.replace(",", " ,").split()
        assert len(words(text)["input_ids"]) == len(spelled) + 2, text


def test_both_forms_of_the_shipped_tokenizer_agree():
    folder = EMBEDDED / "tokenizer"
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == whole["vocab"]
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [tuple(merge.split()) for merge in merges] == [tuple(merge) for merge in whole["merges"]]


def test_the_shipped_folder_is_small_enough():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_the_card_claims_only_names_that_come_out(tmp_path):
    figures = {
        "scenes": {"shape": 0.9}, "scene_prompts": 200, "icons": {"a sun": 1.0, "a fox": 1 / 3}, "icon_share": 0.67,
        "seconds_per_image": 0.5, "steps": 20, "guidance_scale": 4.0, "device": "cpu, 2 threads",
    }  # fmt: skip
    card.write_card(tmp_path, figures)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "every style: a sun. Learned, but not reliable: a fox." in text
    assert "| shape | 90.0 % |" in text
