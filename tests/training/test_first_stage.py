"""The first stage takes steps: from nothing, or with its encoder frozen; and it goes on after a kill."""

import json

import numpy as np
import pytest
import torch

from latentmill.engine.networks.autoencoder import DiagonalGaussian
from training import architecture, autoencoder, devices, icons, latents, pictures
from training.pictures import Pictures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sprites")]


@pytest.fixture
def sprites(monkeypatch):
    """A red square for every icon: the real ones come from a registry."""
    square = np.zeros((256, 256, 4), dtype=np.float32)
    square[64:192, 64:192] = (1, 0, 0, 1)
    table = dict.fromkeys([(name, style) for name in icons.NAMES for style in icons.STYLES], square)
    monkeypatch.setattr(icons, "load_sprites", lambda folder: table)


@pytest.fixture
def small(monkeypatch):
    """Steps on small crops only, and few pictures."""
    monkeypatch.setattr(autoencoder, "DIET", ((1.0, 64, 4),))
    monkeypatch.setattr(autoencoder, "FROZEN_DIET", ((1.0, 64, 2),))
    monkeypatch.setattr(autoencoder, "REPORT_STEPS", 1)


def changed(stage, before):
    return {name for name, value in stage.model.state_dict().items() if not torch.equal(value, before[name])}


def step(tmp_path, frozen):
    stage = autoencoder.Stage(Pictures(tmp_path, np.random.default_rng(0)), frozen)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    judged = {name: value.clone() for name, value in stage.critic.state_dict().items()}
    autoencoder.set_learning_rate(stage.optimizer, 1e-3)
    with torch.enable_grad():
        figures = stage.step(0.9)
    assert any(not torch.equal(value, judged[name]) for name, value in stage.critic.state_dict().items())
    assert all(np.isfinite(value) for value in figures.values())
    return changed(stage, before), figures


def test_from_nothing_both_halves_learn_and_the_latents_are_regularised(tmp_path, small):
    names, figures = step(tmp_path, None)
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert figures["kl"] > 0


def test_a_frozen_encoder_stays_and_the_decoder_learns(tmp_path, small):
    stage = autoencoder.Stage(Pictures(tmp_path, np.random.default_rng(0)), None)
    names, figures = step(tmp_path, stage.model.state_dict())
    assert {name.split(".")[0] for name in names} == {"decoder", "post_quant_conv"}
    assert "kl" not in figures


def test_before_its_time_nobody_listens_to_the_critic(tmp_path, small):
    stage = autoencoder.Stage(Pictures(tmp_path, np.random.default_rng(0)), None)
    with torch.enable_grad():
        figures = stage.step(0.0)
    assert "critic" in figures
    assert "ratio" not in figures


def test_what_is_judged_of_a_picture_has_something_in_it():
    pixels = torch.zeros(3, 3, 256, 256)
    pixels[0, :, 10:20, 10:20] = pixels[1, :, 150:160, 240:250] = 1.0
    for picture, (y, x) in zip(pixels[:2], autoencoder.windows(pixels, 128)[:2], strict=True):
        assert 0 <= y <= 128
        assert 0 <= x <= 128
        assert autoencoder.cut(picture[None], [(y, x)], 128).sum() == picture.sum()
    assert autoencoder.windows(pixels, 256) == [(0, 0)] * 3
    assert autoencoder.windows(pixels[:, :, :64, :64], 128) == [(0, 0)] * 3


def test_a_frozen_stage_cuts_latents_and_pixels_at_the_same_place(tmp_path, monkeypatch):
    def average(pixels):
        mean = torch.nn.functional.avg_pool2d(pixels, architecture.FACTOR)
        return DiagonalGaussian(mean, torch.full_like(mean, -30.0))

    start = autoencoder.Stage(Pictures(tmp_path, np.random.default_rng(0)), None).model.state_dict()
    stage = autoencoder.Stage(Pictures(tmp_path, np.random.default_rng(1)), start)
    monkeypatch.setattr(stage.model, "encode", average)
    monkeypatch.setattr(autoencoder, "EXTRA_NOISE", 0.0)
    squares, cut, _ = stage.examples(4, 128)
    assert squares.shape == (4, 3, 128, 128)
    torch.testing.assert_close(cut, torch.nn.functional.avg_pool2d(squares, architecture.FACTOR), atol=1e-5, rtol=0)


@pytest.mark.long
def test_beside_a_gpu_other_processes_draw_the_pictures_and_always_the_same(tmp_path, monkeypatch):
    for module in (devices, pictures):
        monkeypatch.setattr(module, "renderers", lambda: 2)
    seen = []
    for seed in (3, 3, 4):
        stream = Pictures(tmp_path, np.random.default_rng(0))
        stream.start_over([1, seed])
        seen.append(torch.cat([stream.whole(2 * pictures.BLOCK), stream.whole(3)]))
    assert seen[0].shape == (2 * pictures.BLOCK + 3, 3, 256, 256)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][: pictures.BLOCK], seen[0][pictures.BLOCK : 2 * pictures.BLOCK])


def test_training_goes_on_where_a_kill_left_it(tmp_path, small):
    with torch.enable_grad():
        for minutes in (0.005, 0.02):
            autoencoder.train(tmp_path, minutes, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "autoencoder.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    checkpoint = torch.load(tmp_path / autoencoder.CHECKPOINT, weights_only=True)
    assert checkpoint["step"] == len(rows)
    assert checkpoint["elapsed"] >= 60 * 0.02
    assert all(value.isfinite().all() for value in checkpoint["average"]["values"].values())


def test_latents_from_nothing_come_out_normal_and_the_first_stage_is_folded(tmp_path, small, monkeypatch):
    from training import tokenizer

    tokenizer.build(tmp_path / "tokenizer")
    with torch.enable_grad():
        autoencoder.train(tmp_path, 0.001, processes=1)
    left = {"latents": torch.zeros(1, architecture.LATENT_CHANNELS, 16, 16), "index": torch.tensor([0])}
    torch.save(left, tmp_path / "latents-part-7.pt")  # of a call with more processes, which was stopped
    latents.encode(tmp_path, {"scenes": 3, "pairs": 3, "icons": 2}, processes=1)
    stored = torch.load(tmp_path / latents.CHECKPOINT, weights_only=True)
    assert stored["latents"].shape == (8, architecture.LATENT_CHANNELS, 16, 16)
    assert stored["tokens"].shape == (8, latents.CAPTIONS_PER_PICTURE, architecture.MODEL_MAX_LENGTH)
    assert float(stored["latents"].float().mean().abs()) < 0.01
    assert float(stored["latents"].float().std(dim=(0, 2, 3)).mean()) == pytest.approx(1, abs=0.01)
    assert (tmp_path / latents.AUTOENCODER).is_file()
