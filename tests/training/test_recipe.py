"""The recipe's own arithmetic: folding, timesteps, averages, checkpoints, tokenizer, card."""

import argparse
import json

import numpy as np
import pytest
import torch

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import (
    architecture,
    autoencoder,
    card,
    critic,
    curves,
    diffusion,
    export,
    icons,
    latents,
    pairs,
    scenes,
    tokenizer,
)
from training.__main__ import begin
from training.common import RunningAverage, learning_rate, load_checkpoint, save_checkpoint, to_pictures, to_tensor
from training.export import EMBEDDED, SIZE_LIMIT
from training.latents import fold
from training.perceptual import Perceptual


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


def test_the_perceptual_distance_sees_blur_and_not_brightness_of_a_level():
    perceptual = Perceptual()
    scene = scenes.Scene(shape="star", colour="red", background="cream", position="center", size="large")
    true = to_tensor([scenes.render(scene, np.random.default_rng(0))])
    blurred = torch.nn.functional.avg_pool2d(true, 9, stride=1, padding=4)
    equal, brighter, soft = (float(perceptual(fake, true)) for fake in (true, true + 2 / 255, blurred))
    assert equal == 0
    assert 10 * brighter < soft


def test_the_perceptual_network_halves_the_side_and_knows_its_weights():
    perceptual = Perceptual()
    features = perceptual.features(torch.zeros(1, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in features] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4)]
    assert not list(perceptual.parameters())


def test_timesteps_cover_the_schedule_and_favour_where_edges_are_settled():
    timesteps = diffusion.stratified_timesteps(100, 1000, torch.Generator().manual_seed(0))
    assert timesteps.min() < 20
    assert timesteps.max() > 970
    assert int((timesteps < 100).sum()) in range(11, 14)
    assert int((timesteps >= 500).sum()) in range(24, 27)


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


def test_the_tokenizer_knows_every_word_of_the_captions(tmp_path):
    tokenizer.build(tmp_path)
    words = tokenizer.load(tmp_path)
    rng = np.random.default_rng(1)
    texts = [scenes.caption(scene, rng) for scene in scenes.all_scenes()[::50]]
    texts += [pairs.caption(pair, rng) for pair in pairs.draw_pairs(100, rng, held_out=True)]
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


def figures(**changes):
    return {
        "scenes": {"shape": 0.9, **{f"position {place}": 1.0 for place in scenes.POSITIONS}}, "scene_prompts": 200,
        "edges": {"F-score at 2 px": 0.5}, "first_stage": {"scenes, PSNR in dB": 28.7},
        "pairs": {"relation": 0.9, "shapes": 0.8}, "pair_prompts": 100, "steering": {"flat": 0.1},
        "icons": {"a sun": {"flat": True, "glossy": True}, "a fox": {"flat": True, "glossy": False}},
        "icon_share": 0.75, "seconds_per_image": 0.5, "processor_seconds_per_image": 0.4, "steps": 20,
        "guidance_scale": 4.0, "device": "cpu, 2 threads", **changes,
    }  # fmt: skip


def test_the_card_claims_only_what_comes_out(tmp_path):
    card.write_card(tmp_path, figures())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "each of them: a sun. Learned, but not reliable: a fox." in text
    assert "| shape | 90.0 % |" in text
    assert "**Two objects.**" in text
    assert "Positions: center, left, right, top, bottom." in text
    worse = {**figures()["scenes"], "position left": 0.5}
    card.write_card(tmp_path, figures(pairs={"relation": 0.6, "shapes": 0.5}, scenes=worse))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "**Two objects.**" not in text
    assert "Positions: center, right, top, bottom." in text


def test_the_card_tells_the_hours_that_the_export_wrote_down(tmp_path):
    stage = {"began_with": "nothing", "steps": 1234, "processes": 2}
    stage |= {"minutes_of_each_core": 61.0, "minutes_by_the_clock": 75.0}
    (tmp_path / card.TRAINING).write_text(json.dumps({"first stage": stage}))
    card.write_card(tmp_path, figures())
    assert "| first stage | nothing | 1,234 | 2 | 61 | 75 |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@torch.enable_grad()
def test_the_critics_gradient_is_weighed_against_the_reconstructions():
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    decoded = last(torch.randn(2, 4, 32, 32))
    seen = decoded[:, :, 8:24, 8:24]
    others = torch.randn_like(decoded) * 1e-3
    verdict = critic.judge(critic.Critic(), seen, torch.ones(2, 1, 2, 2), last.weight, decoded, others)
    (ours,) = torch.autograd.grad(decoded, last.weight, others, retain_graph=True)
    (theirs,) = torch.autograd.grad(seen, last.weight, verdict.gradient)
    assert float(theirs.norm() / ours.norm()) == pytest.approx(critic.WEIGHT, rel=1e-3)


@torch.enable_grad()
def test_the_critic_learns_to_tell_noise_from_plain_pictures():
    torch.manual_seed(0)
    judge = critic.Critic()
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    real, fake = torch.zeros(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    where = torch.ones(2, 1, 4, 4)
    before = float(critic.critic_loss(judge, real, fake, where).detach())
    for _ in range(20):
        optimizer.zero_grad()
        critic.critic_loss(judge, real, fake, where).backward()
        optimizer.step()
    assert float(critic.critic_loss(judge, real, fake, where).detach()) < 0.5 * before


def test_the_critic_is_asked_where_the_true_picture_has_an_edge():
    pixels = torch.zeros(1, 3, 256, 256)
    assert not critic.eventful(pixels).any()
    pixels[..., 128:] = 1.0
    where = critic.eventful(pixels)
    assert where.shape == (1, 1, 32, 32)
    assert where[..., 14:18].all()
    assert not where[..., :12].any()
    assert not where[..., 20:].any()


def test_captions_lead_to_pictures_of_their_kind():
    counts = {"scenes": 3, "pairs": 2, "icons": 1}
    drawn = latents.Pictures.draw(counts)
    captions = drawn.captions()
    assert len(captions) == 6 * latents.CAPTIONS_PER_PICTURE
    assert drawn.pairs[0].first.shape in captions[3 * latents.CAPTIONS_PER_PICTURE]
    assert drawn.icons[0].name in captions[-1]
    assert drawn == latents.Pictures.draw(counts)


def test_batches_draw_each_kind_by_its_share():
    counts = {"scenes": 5, "pairs": 3, "icons": 2}
    data = diffusion.Data(
        latents=torch.arange(10.0).reshape(10, 1, 1, 1).half(), tokens=torch.zeros(10, 6, 77, dtype=torch.int16),
        empty=torch.zeros(77, dtype=torch.long), counts=counts,
    )  # fmt: skip
    seen, _ = data.batch(4000, torch.Generator().manual_seed(0))
    values = seen.flatten()
    assert set(values.tolist()) == set(range(10))
    assert float((values < 5).float().mean()) == pytest.approx(diffusion.SHARES["scenes"], abs=0.03)
    assert float((values >= 8).float().mean()) == pytest.approx(diffusion.SHARES["icons"], abs=0.03)


def test_a_warm_start_keeps_what_each_word_meant(tmp_path):
    state = export.warm_start(tmp_path)
    shipped, words = tokenizer.load(EMBEDDED / "tokenizer"), tokenizer.load(tmp_path / "tokenizer")
    (key,) = [key for key in state if key.endswith(export.TABLE)]
    weights = export.load_file(EMBEDDED / "text_encoder" / "model.safetensors")
    (table,) = [value.float() for name, value in weights.items() if name.endswith(export.TABLE)]
    for word in ("red</w>", "circle</w>", tokenizer.START, tokenizer.END):
        assert torch.equal(state[key][words.get_vocab()[word]], table[shipped.get_vocab()[word]])
    diffusion.Model(len(words)).load_state_dict(state)
    assert torch.equal(
        latents.first_stage(tmp_path)["decoder.conv_out.bias"],
        export.load_file(EMBEDDED / "vae" / export.WEIGHTS)["decoder.conv_out.bias"].float(),
    )


def test_a_work_folder_goes_on_with_what_it_began_with(tmp_path):
    def options(folder, from_scratch):
        (tmp_path / folder).mkdir(exist_ok=True)
        return argparse.Namespace(work=tmp_path / folder, from_scratch=from_scratch)

    assert begin(options("nothing", from_scratch=True)) is None
    assert begin(options("nothing", from_scratch=False)) is None
    assert not (tmp_path / "nothing" / autoencoder.START).exists()
    assert begin(options("shipped", from_scratch=False)) is not None
    with pytest.raises(SystemExit, match="began with the shipped weights"):
        begin(options("shipped", from_scratch=True))


def test_curves_survive_a_cut_line_and_steps_done_twice(tmp_path):
    rows = [{"step": step, "minutes": step / 10, "loss": 1 / step} for step in (1, 2, 3, 2, 3, 4)]
    (tmp_path / "diffusion.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 5, "mi')
    curves.draw(tmp_path, tmp_path / "curves.png")
    assert [row["step"] for row in curves._read(tmp_path / "diffusion.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "curves.png").stat().st_size > 1000
