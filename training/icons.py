"""Captioned icons from npm packages: Fluent Emoji, flat and with gradients (MIT), and Noto Emoji (Apache-2.0).

The packages are fetched with npm at pinned versions into the work folder; only rendered pictures of the names below
are learned. A style is a package: another set of icons is one more line in `PACKAGES`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.scenes import BACKGROUNDS, IMAGE_SIZE, Pixels

PACKAGES = {  # the style's word in captions -> npm package, version
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7"),
    "cartoon": ("@iconify-json/noto", "1.2.9"),
}
STYLES = tuple(PACKAGES)
SPRITES = "sprites.npz"
NAMES: dict[str, str] = {  # what captions say -> the icon's name in all sets
    "a red apple": "red-apple", "a banana": "banana", "a strawberry": "strawberry",
    "a watermelon": "watermelon", "a pizza": "pizza", "a doughnut": "doughnut", "a sun": "sun",
    "a crescent moon": "crescent-moon", "a rainbow": "rainbow", "a fire": "fire", "a droplet": "droplet",
    "a house": "house", "a rocket": "rocket", "a car": "automobile", "a cat": "cat-face", "a panda": "panda",
    "a frog": "frog", "a pig": "pig-face", "a penguin": "penguin", "a butterfly": "butterfly",
    "a ladybug": "lady-beetle", "a tree": "evergreen-tree", "a mushroom": "mushroom", "a crown": "crown",
    "a dog": "dog-face", "a fox": "fox", "a bear": "bear", "a koala": "koala", "a lion": "lion",
    "a rabbit": "rabbit-face", "a mouse": "mouse-face", "a monkey": "monkey-face", "an owl": "owl", "a whale": "whale",
    "a fish": "fish", "an octopus": "octopus", "a turtle": "turtle", "a snail": "snail", "a bee": "honeybee",
    "a cactus": "cactus", "a sunflower": "sunflower", "a tulip": "tulip", "a clover": "four-leaf-clover",
    "a pair of cherries": "cherries", "a bunch of grapes": "grapes", "a lemon": "lemon", "a pineapple": "pineapple",
    "a pear": "pear", "a tangerine": "tangerine", "a carrot": "carrot", "a hamburger": "hamburger",
    "an ice cream": "ice-cream", "a cookie": "cookie", "a cloud": "cloud", "an umbrella": "umbrella", "a key": "key",
    "a bell": "bell", "a balloon": "balloon", "a gift": "wrapped-gift", "a basketball": "basketball",
    "a sailboat": "sailboat", "a light bulb": "light-bulb", "a ghost": "ghost", "a snowman": "snowman",
}  # fmt: skip
SIDE = 200  # pixels of the icon's own square in the picture, before jitter

Sprite = NDArray[np.float32]  # (256, 256, 4) premultiplied RGBA in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Icon:
    """What an icon picture shows; `background` is one of the scenes' backgrounds."""

    name: str
    style: str
    background: str


def fetch(folder: Path) -> None:
    """Download the pinned packages below `folder` unless they are there; needs npm and a registry."""
    if all(_icons_json(folder, style).is_file() for style in STYLES):
        return
    if shutil.which("npm") is None:
        raise RuntimeError("the icon sets come from the npm registry: install npm (Node.js) and run again")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{package}@{version}" for package, version in PACKAGES.values()]
    command = ["npm", "install", "--prefix", str(folder), "--no-save", "--no-audit", "--no-fund", *wanted]
    subprocess.run(command, check=True)


def _icons_json(folder: Path, style: str) -> Path:
    return folder / "node_modules" / PACKAGES[style][0] / "icons.json"


def load_sprites(folder: Path) -> dict[tuple[str, str], Sprite]:
    """(name, style) -> the icon at 256 px on a transparent ground; rendered once, kept in `folder`."""
    cache = folder / SPRITES
    keys = [(name, style) for name in NAMES for style in STYLES]
    if cache.is_file():
        with np.load(cache) as stored:
            if stored["keys"].tolist() == [list(key) for key in keys]:
                pixels = stored["pixels"]
                return {key: pixels[index].astype(np.float32) / np.float32(255) for index, key in enumerate(keys)}
    fetch(folder)
    sets = {style: json.loads(_icons_json(folder, style).read_text()) for style in STYLES}
    sprites = [_render_svg(sets[style], NAMES[name]) for name, style in keys]
    np.savez_compressed(cache, keys=np.array(keys), pixels=np.stack(sprites))
    return {key: sprite.astype(np.float32) / np.float32(255) for key, sprite in zip(keys, sprites, strict=True)}


def _render_svg(icon_set: dict[str, Any], name: str) -> Pixels:
    """One icon as premultiplied RGBA: (256, 256, 4) uint8."""
    import resvg_py  # only drawing needs it: a machine that trains on latents made elsewhere need not have it

    body = icon_set["icons"][name]
    width, height = (body.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
    rgba = np.asarray(Image.open(BytesIO(bytes(png))).convert("RGBA"), dtype=np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return np.round(rgba).astype(np.uint8)


def caption(icon: Icon, rng: np.random.Generator | None = None) -> str:
    """A caption of `icon`; without `rng` the plain form that the evaluation uses."""
    article = "a"
    text = f"{article} {icon.style} icon of {icon.name}"
    if rng is not None and rng.random() < 0.15:  # any style will do
        text = icon.name if rng.random() < 0.5 else f"an icon of {icon.name}"
    if icon.background == "white" and (rng is None or rng.random() < 0.7):
        return text  # an icon without a word about its background is on white
    return f"{text} on a {icon.background} background"


def render(icon: Icon, sprites: Mapping[tuple[str, str], Sprite], rng: np.random.Generator | None = None) -> Pixels:
    """`icon` over its background, with slight jitter in place, size and turn if `rng`: (256, 256, 3) uint8."""
    sprite = sprites[icon.name, icon.style]
    scale, turn, shift = SIDE / IMAGE_SIZE, 0.0, np.zeros(2)
    back = np.asarray(BACKGROUNDS[icon.background], dtype=np.float32)
    if rng is not None:
        scale *= float(rng.uniform(0.95, 1.05))
        turn = float(rng.uniform(-3, 3))
        shift = rng.uniform(-5, 5, 2)
        back = back + rng.uniform(-3, 3, 3).astype(np.float32)
    middle = (IMAGE_SIZE - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), turn, scale)
    matrix[:, 2] += shift
    moved = cv2.warpAffine(sprite, matrix, (IMAGE_SIZE, IMAGE_SIZE), flags=cv2.INTER_AREA)
    picture = moved[..., :3] * 255 + (1 - moved[..., 3:]) * back
    return np.asarray(np.clip(np.round(picture), 0, 255), dtype=np.uint8)


def draw_icons(names: Sequence[str], count: int, rng: np.random.Generator) -> list[Icon]:
    """`count` icons, each name and style equally often, half of them on white."""
    colours = [name for name in BACKGROUNDS if name != "white"]
    pairs = [(name, style) for name in names for style in STYLES]
    icons: list[Icon] = []
    while len(icons) < count:
        for index in rng.permutation(len(pairs)):
            name, style = pairs[index]
            ground = "white" if rng.random() < 0.5 else colours[int(rng.integers(len(colours)))]
            icons.append(Icon(name=name, style=style, background=ground))
    return icons[:count]
