"""Labels in any script: Pillow's own font, and for what it lacks the fonts of this machine, or one that is named.

Pillow's font is everywhere and has the characters of ASCII. Fontconfig's list says which characters each installed
font has. What none has is drawn as an empty box and counted, so that a report can say so: the gallery, where the
browser's fonts serve, shows it.
"""

from __future__ import annotations

import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

from latentmill.jobs.errors import JobError, UsageError

_FORMAT = "%{file}\t%{index}\t%{scalable}\t%{color}\t%{style}\t%{charset}\n"
_LIST_SECONDS = 20
_TESTED_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Installed:
    """A font file, and the characters that it has as ranges: firsts and lasts."""

    path: str
    index: int
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]

    def has(self, character: str) -> bool:
        place = bisect_right(self.firsts, ord(character)) - 1
        return place >= 0 and ord(character) <= self.lasts[place]


@dataclass(kw_only=True)
class Lettering:
    """Text as it is measured and drawn. `missing` are the characters that had no glyph so far."""

    font_file: str | None = None
    missing: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.font_file is not None:
            _truetype(self.font_file, 0, _TESTED_SIZE)

    def width(self, text: str, size: int) -> float:
        """Pixels."""
        return sum(font.getlength(piece) for font, piece in self._pieces(text, size))

    def draw(
        self, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int]
    ) -> None:
        """One line with its top left corner at `place`."""
        x, y = place
        left = float(x)
        baseline = y + _default(size).getmetrics()[0]
        for font, piece in self._pieces(text, size):
            draw.text((left, baseline), piece, font=font, fill=ink, anchor="ls")
            left += font.getlength(piece)

    def _pieces(self, text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """The text by fonts: the whole line in the one that has most of it, what that lacks in Pillow's own."""
        lacking = {character for character in text if not _has_glyph(None, character)}
        if not lacking:
            return [(_default(size), text)]
        font, known = self._best(text, lacking, size)
        self.missing |= lacking - known
        pieces: list[tuple[ImageFont.FreeTypeFont, str]] = []
        for character in text:
            one = font if font is not None and character in known else _default(size)
            if pieces and pieces[-1][0] is one:
                pieces[-1] = (one, pieces[-1][1] + character)
            else:
                pieces.append((one, character))
        return pieces

    def _best(self, text: str, lacking: set[str], size: int) -> tuple[ImageFont.FreeTypeFont | None, set[str]]:
        """The font that has most of what is lacking, then most of all, and which characters of the text it has."""
        if self.font_file is not None:
            return _truetype(self.font_file, 0, size), {c for c in set(text) if _has_glyph(self.font_file, c)}
        best: _Installed | None = None
        most: set[str] = set()
        for font in _installed():
            known = {character for character in set(text) if font.has(character)}
            if (len(known & lacking), len(known)) > (len(most & lacking), len(most)):
                best, most = font, known
        if best is None or not most & lacking:
            return None, set()
        return _truetype(best.path, best.index, size), most


@lru_cache(maxsize=8)
def _default(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise JobError("this Pillow was built without FreeType, so nothing can be labelled; install Pillow's wheel")
    return font


@lru_cache(maxsize=64)
def _truetype(path: str, index: int, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, size, index=index)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no font that can be drawn with: {error}; name a .ttf or .otf file") from error


@lru_cache(maxsize=65_536)
def _has_glyph(path: str | None, character: str) -> bool:
    """Whether a font draws the character otherwise than one that no font has (U+FFFF)."""
    if character.isspace():
        return True
    font = _default(_TESTED_SIZE) if path is None else _truetype(path, 0, _TESTED_SIZE)
    mask, none = font.getmask(character), font.getmask("\uffff")
    return mask.size != none.size or bytes(mask) != bytes(none)


@lru_cache(maxsize=1)
def _installed() -> Sequence[_Installed]:
    """The fonts that fontconfig knows and that can be drawn at any size, in the same order on the same machine."""
    program = shutil.which("fc-list")
    if program is None:
        return ()
    try:
        done = subprocess.run(  # noqa: S603 - the machine's own program, without any text of a user
            [program, "--format", _FORMAT], capture_output=True, text=True, timeout=_LIST_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()  # then labels have what Pillow's own font has, and the report says what is missing
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    usable = [line for line in lines if len(line) == 6 and line[2] == "True" and line[3] != "True"]
    plain = sorted(usable, key=lambda line: (line[4] not in {"Regular", "Book"}, "Mono" in line[0], line[0], line[1]))
    return [font for line in plain if (font := _read_line(*line)) is not None]


def _read_line(path: str, index: str, _scalable: str, _color: str, _style: str, charset: str) -> _Installed | None:
    """None for what cannot be read as a font's line."""
    try:
        ranges = [[int(end, 16) for end in part.split("-")] for part in charset.split()]
        number = int(index)
    except ValueError:
        return None
    if number > 0xFFFF or Path(path).suffix.lower() not in {".ttf", ".otf", ".ttc", ".otc"}:
        return None  # an instance of a variable font: the font itself is in the list as well
    return _Installed(
        path=path, index=number, firsts=tuple(part[0] for part in ranges), lasts=tuple(part[-1] for part in ranges)
    )
