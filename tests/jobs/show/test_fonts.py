from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentmill.jobs.errors import UsageError
from latentmill.jobs.show import fonts
from latentmill.jobs.show.fonts import Lettering

ARABIC, NOWHERE = "سلام", "\U0010fffd"


@pytest.fixture
def deja_vu() -> str:
    """A font that has Arabic letters, which Pillow's has not."""
    paths = sorted(Path("/usr/share/fonts").rglob("DejaVuSans.ttf"))
    if not paths:
        pytest.skip("DejaVu is not installed on this machine")
    return str(paths[0])


def drawn(text: str, lettering: Lettering) -> np.ndarray:
    page = Image.new("RGB", (200, 40), "white")
    lettering.draw(ImageDraw.Draw(page), (4, 4), text, 17, (0, 0, 0))
    return np.asarray(page)


@pytest.fixture
def without_fonts(monkeypatch: pytest.MonkeyPatch):
    """A machine that has no fonts of its own."""
    monkeypatch.setattr(fonts, "_installed", tuple)


def test_plain_labels_look_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch):
    here = drawn("guidance 7.5, <a cat>", Lettering())
    monkeypatch.setattr(fonts, "_installed", tuple)
    assert np.array_equal(here, drawn("guidance 7.5, <a cat>", Lettering()))


def test_what_no_font_has_is_a_box_and_told(without_fonts: None):
    lettering = Lettering()
    assert drawn("a " + NOWHERE, lettering).min() < 128
    assert lettering.missing == {NOWHERE}
    assert lettering.width(ARABIC, 17) > 0
    assert lettering.missing == {NOWHERE, *ARABIC}


def test_a_font_that_is_named_serves_any_script(without_fonts: None, deja_vu: str):
    lettering = Lettering(font_file=deja_vu)
    boxes = drawn(ARABIC, Lettering())
    assert not np.array_equal(drawn(ARABIC, lettering), boxes)
    assert lettering.missing == set()
    assert lettering.width(f"cat {ARABIC}", 17) > lettering.width("cat ", 17) > 0
    lettering.width(NOWHERE, 17)
    assert lettering.missing == {NOWHERE}


def test_fonts_of_this_machine_serve_what_pillow_s_lacks(deja_vu: str):
    if shutil.which("fc-list") is None:
        pytest.skip("fontconfig is not installed on this machine")
    lettering = Lettering()
    assert not np.array_equal(drawn(ARABIC, lettering), drawn("\uffff" * len(ARABIC), Lettering()))
    assert lettering.missing == set()


def test_fontconfig_s_list_is_read_and_what_cannot_be_drawn_with_is_left_out():
    font = fonts._read_line("/f/a.ttf", "0", "True", "False", "Regular", "20-7e a0 4e00-9fff")
    assert font is not None
    assert [font.has(character) for character in "\x1fA~\x7f\xa0\xa1中"] == [
        False,
        True,
        True,
        False,
        True,
        False,
        True,
    ]
    assert fonts._read_line("/f/a.pcf.gz", "0", "True", "False", "Regular", "20") is None
    assert fonts._read_line("/f/a.ttf", "65536", "True", "False", "Bold", "20") is None
    assert fonts._read_line("/f/a.ttf", "0", "True", "False", "Regular", "no ranges") is None


def test_a_file_that_is_no_font_is_refused(tmp_path: Path):
    wrong = tmp_path / "font.ttf"
    wrong.write_bytes(b"no font")
    with pytest.raises(UsageError, match="is no font"):
        Lettering(font_file=str(wrong))
