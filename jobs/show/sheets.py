"""Drawing one contact sheet: a title, column and row headers, and a grid of pictures with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from latentmill.engine.types import Pixels
from latentmill.jobs.show.display import safe
from latentmill.jobs.show.fonts import Lettering

ELLIPSIS = "..."
"""Three dots: the built-in font has no glyph for the single character."""

_MARGIN = 12
_GAP = 8
TILE = 192
TITLE_SIZE, _HEADER_SIZE, CAPTION_SIZE = 17, 14, 12
_READERS = 8

_PAPER, _INK, _FAINT = (250, 250, 248), (24, 24, 27), (113, 113, 122)
_TILES = {"flagged": ((254, 243, 199), (146, 64, 14)), "failed": ((254, 226, 226), (153, 27, 27))}
"""Background and text of the tile that stands for a picture that is not shown."""


ReadPixels = Callable[[Mapping[str, Any]], "Pixels | None"]
"""The pixels of a row's picture; None if it cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One sample: the picture of `row`, or a tile that says `status` and `detail`. `caption` lines go below."""

    row: Mapping[str, Any] | None
    status: str
    detail: str
    caption: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class Sheet:
    """One page. Cells are addressed by (row, column); headers may be missing, cells may stay empty."""

    title: tuple[str, ...]
    column_headers: tuple[str, ...] = ()
    row_headers: dict[int, str] = field(default_factory=dict)
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    caption_lines: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Positions on the page, in pixels."""

    tile: int
    left: int
    top: int
    row_height: int
    width: int
    height: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.tile + _GAP), self.top + row * self.row_height


def draw_sheet(
    sheet: Sheet, read_pixels: ReadPixels, *, tile: int = TILE, lettering: Lettering | None = None
) -> Image.Image:
    """The page as a picture. `read_pixels` gives None for a picture that cannot be read; its cell then says so."""
    layout = _measure(sheet, tile)
    page = Image.new("RGB", (layout.width, layout.height), _PAPER)
    pen = _Pen(ImageDraw.Draw(page), lettering or Lettering())
    pen.lines((_MARGIN, _MARGIN), sheet.title, TITLE_SIZE, _INK, layout.width - 2 * _MARGIN)
    for column, header in enumerate(sheet.column_headers):
        x, _ = layout.place(0, column)
        pen.lines((x, layout.top - _line(_HEADER_SIZE) - 4), [header], _HEADER_SIZE, _INK, tile)
    for row, header in sheet.row_headers.items():
        _, y = layout.place(row, 0)
        room = tile // _line(_HEADER_SIZE)
        width = layout.left - _MARGIN - _GAP
        pen.lines((_MARGIN, y), wrap(header, _HEADER_SIZE, width, room, pen.lettering), _HEADER_SIZE, _INK, width)
    for (row, column), thumbnail in _thumbnails(sheet, read_pixels, tile):
        cell, (x, y) = sheet.cells[row, column], layout.place(row, column)
        if thumbnail is None:
            _draw_tile(pen, (x, y), cell, tile)
        else:
            page.paste(thumbnail, (x + (tile - thumbnail.width) // 2, y + (tile - thumbnail.height) // 2))
        pen.lines((x, y + tile + 2), cell.caption, CAPTION_SIZE, _FAINT, tile)
    return page


def wrap(text: str, size: int, width: int, max_lines: int, lettering: Lettering | None = None) -> list[str]:
    """The text, made harmless, in at most `max_lines` lines of `width` pixels; a longer text ends in dots."""
    lettering = lettering or Lettering()
    lines: list[str] = []
    rest = safe(" ".join(text.split()), 1000)
    while rest and len(lines) < max_lines:
        take = _fitting(rest, size, width, lettering)
        if take < len(rest) and " " in rest[1 : take + 1]:
            take = rest.rindex(" ", 1, take + 1)
        lines.append(rest[:take].rstrip())
        rest = rest[take:].lstrip()
    if rest and lines:
        last = lines[-1]
        while last and lettering.width(last + ELLIPSIS, size) > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + ELLIPSIS
    return lines


def _fitting(text: str, size: int, width: int, lettering: Lettering) -> int:
    """How many characters fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = lettering.width(text[:middle], size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _measure(sheet: Sheet, tile: int) -> _Layout:
    rows = 1 + max((row for row, _ in sheet.cells), default=0)
    columns = max(len(sheet.column_headers), 1 + max((column for _, column in sheet.cells), default=0))
    left = _MARGIN + (tile + _GAP if sheet.row_headers else 0)
    top = _MARGIN + len(sheet.title) * _line(TITLE_SIZE) + _GAP
    if sheet.column_headers:
        top += _line(_HEADER_SIZE) + 4
    row_height = tile + sheet.caption_lines * _line(CAPTION_SIZE) + _GAP
    return _Layout(
        tile=tile,
        left=left,
        top=top,
        row_height=row_height,
        width=left + columns * (tile + _GAP) - _GAP + _MARGIN,
        height=top + rows * row_height + _MARGIN,
    )


def _thumbnails(
    sheet: Sheet, read_pixels: ReadPixels, tile: int
) -> Iterator[tuple[tuple[int, int], Image.Image | None]]:
    """Each place with its picture, read several at a time; None where a tile belongs."""

    def load(cell: Cell) -> Image.Image | None:
        pixels = None if cell.row is None else read_pixels(cell.row)
        if pixels is None:
            return None
        picture = Image.fromarray(pixels)
        picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
        return picture

    with ThreadPoolExecutor(_READERS) as pool:
        yield from zip(sheet.cells, pool.map(load, sheet.cells.values()), strict=True)


def _draw_tile(pen: _Pen, place: tuple[int, int], cell: Cell, tile: int) -> None:
    status = cell.status if cell.row is None else "failed"
    paper, ink = _TILES.get(status, _TILES["failed"])
    x, y = place
    pen.draw.rectangle((x, y, x + tile - 1, y + tile - 1), fill=paper, outline=ink)
    words = cell.status if cell.row is None else "unreadable"
    lines = [words, *wrap(cell.detail, CAPTION_SIZE, tile - 16, 6, pen.lettering)]
    pen.lines((x + 8, y + 8), lines[:1], _HEADER_SIZE, ink, tile - 16)
    pen.lines((x + 8, y + 12 + _line(_HEADER_SIZE)), lines[1:], CAPTION_SIZE, ink, tile - 16)


@dataclass(frozen=True, slots=True)
class _Pen:
    draw: ImageDraw.ImageDraw
    lettering: Lettering

    def lines(
        self, place: tuple[int, int], lines: Sequence[str], size: int, ink: tuple[int, int, int], width: int
    ) -> None:
        """Lines below each other, each cut where it is wider than `width`."""
        x, y = place
        for line in lines:
            for shown in wrap(line, size, width, 1, self.lettering):
                self.lettering.draw(self.draw, (x, y), shown, size, ink)
            y += _line(size)


def _line(size: int) -> int:
    return round(size * 1.3)
