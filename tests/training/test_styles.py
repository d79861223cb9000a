"""Styles: what becomes of colours and edges, and what is learned of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentmill.engine import EMBEDDED_MODEL
from training import scenes
from training.drawing import Settings
from training.styles import DYES, LOOKS, velocity_loss

ROW = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], dtype=np.uint8)


@pytest.fixture
def picture() -> scenes.Pixels:
    scene = scenes.Scene(shape="square", colour="red", background="white", position="center", size="large")
    return scenes.render(scene, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "dark", "light"),
    [("sepia", (60, 35, 15), (245, 225, 185)), ("blueprint", (15, 45, 120), (225, 238, 255))],
)
def test_a_dye_has_two_colours_and_what_is_between_them(name, dark, light):
    black, white, red = DYES[name](ROW)[0].astype(int)
    assert (tuple(black), tuple(white)) == (dark, light)
    assert (black < red).all()
    assert (red < white).all()


def test_each_look_is_what_its_name_says(picture):
    looks = {name: look(picture) for name, look in LOOKS.items()}
    assert all(look.shape == picture.shape and look.dtype == np.uint8 for look in looks.values())
    assert np.array_equal(255 - looks["inverted"], picture)
    night = looks["night"].astype(int)
    assert night.mean() < 0.5 * picture.mean()
    assert night[0, 0, 2] > night[0, 0, 0]
    same = (looks["outlined"] == picture).all(axis=2)
    assert same[0, 0]
    assert same[128, 128]
    assert 0.03 < 1 - same.mean() < 0.4
    changed = (looks["striped"] != picture).any(axis=2)
    assert not changed[128, 128], "stripes lie behind the object"
    assert 0.2 < changed.mean() < 0.5


def test_the_loss_is_that_of_the_velocity():
    """A network that knows picture and noise has none."""

    class Schedule:
        class config:  # noqa: N801
            num_train_timesteps = 1000

        alphas_cumprod = torch.linspace(0.999, 0.001, 1000)

        def add_noise(self, latents, noise, timesteps):
            self.latents, self.noise = latents, noise
            return latents

    schedule = Schedule()

    def knowing(noisy, timesteps, context):
        alpha_bar = schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * schedule.noise - (1 - alpha_bar).sqrt() * schedule.latents

    latents, contexts, empty = torch.randn(4, 2, 4, 4), torch.randn(4, 3, 5), torch.zeros(1, 3, 5)
    loss = velocity_loss(knowing, schedule, latents, contexts, empty, 8, torch.Generator().manual_seed(0))
    assert loss == 0


@pytest.mark.slow
def test_a_picture_that_fails_ends_the_training():
    """Without it, every later picture would be learned for another one's prompt."""
    settings = Settings(device="cpu")
    with pytest.raises(RuntimeError, match="failed"):
        settings.draw(settings.load(EMBEDDED_MODEL), ["\ud800"], first_seed=0)
