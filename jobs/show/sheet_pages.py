"""Which sample goes where on which contact sheet: sweep axes as rows and columns, the others and prompts as pages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentmill.jobs.manifests.axes import TOGETHER, Axis
from latentmill.jobs.manifests.loras import lora_of_axis
from latentmill.jobs.show.fonts import Lettering
from latentmill.jobs.show.sheets import CAPTION_SIZE, TILE, TITLE_SIZE, Cell, Sheet, wrap

_COLUMNS = 8
PICTURE_FIELDS = ("image", "bytes", "sha256", "width", "height")
"""What reading the picture of a row needs."""
_GRID_ROWS = 8
_PLAIN_COLUMNS, _PLAIN_ROWS = 6, 5
_PLAIN_CAPTION = 2
_TEXT_LIMIT = 400
_NAMES = {"guidance_scale": "guidance", "num_inference_steps": "steps", "negative_prompt": "negative"}


def plan_sheets(
    rows: Iterator[Mapping[str, Any]],
    images_per_row: Iterator[int],
    axes: tuple[Axis, ...],
    max_sheets: int,
    lettering: Lettering | None = None,
) -> list[Sheet]:
    """At most `max_sheets` pages with their cells, from published rows in order of sample_id.

    No axis: prompts side by side. One: a line for each prompt, its values as columns. Two or more: a page for each
    prompt, the last axis as columns, the one before as rows, the others in the title.
    """
    varying = [axis for axis in axes if len(axis.values) > 1]
    if not varying:
        return _plain_sheets(rows, max_sheets, lettering)
    book = _Book(max_sheets=max_sheets, lettering=lettering)
    place = _place_in_line if len(varying) == 1 else _place_on_page
    turned_away = False
    for located in _locate(rows, images_per_row, varying):
        if located.first_of_row and turned_away:
            break
        turned_away = not place(book, located, varying) or turned_away
    return list(book.sheets.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Located:
    """A row of the dataset and where it belongs: the manifest row's number as read, axis digits, image of the row."""

    row: Mapping[str, Any]
    prompt_number: int
    digits: tuple[int, ...]
    image_number: int
    first_of_row: bool


@dataclass(kw_only=True, slots=True)
class _Book:
    """Pages by key, in the order in which they were opened."""

    max_sheets: int
    lettering: Lettering | None = None
    sheets: dict[tuple[object, ...], Sheet] = field(default_factory=dict)
    _lines: dict[tuple[int, int], int] = field(default_factory=dict)

    def line(self, key: tuple[int, int]) -> int:
        """The number of a line, counted over all pages; lines past the last page share one number."""
        if key not in self._lines and len(self._lines) < self.max_sheets * _GRID_ROWS:
            self._lines[key] = len(self._lines)
        return self._lines.get(key, self.max_sheets * _GRID_ROWS)

    def page(self, key: tuple[object, ...], make: Callable[[], Sheet]) -> Sheet | None:
        """The page, opened if necessary; None if the limit of pages is reached."""
        if key not in self.sheets and len(self.sheets) < self.max_sheets:
            self.sheets[key] = make()
        return self.sheets.get(key)


def _locate(
    rows: Iterator[Mapping[str, Any]], images_per_row: Iterator[int], axes: Sequence[Axis]
) -> Iterator[_Located]:
    """Each row's place, from its number: prompts, then the axes, the last one fastest, then images."""
    for prompt_number, images in enumerate(images_per_row):
        combinations = itertools.product(*(range(len(axis.values)) for axis in axes))
        places = ((digits, image) for digits in combinations for image in range(images))
        for number, (digits, image) in enumerate(places):
            yield _Located(
                row=next(rows),
                prompt_number=prompt_number,
                digits=digits,
                image_number=image,
                first_of_row=number == 0,
            )


def _place_in_line(book: _Book, located: _Located, axes: Sequence[Axis]) -> bool:
    """One axis: the sample goes into its prompt's line; long axes continue on further pages."""
    (axis,) = axes
    line = book.line((located.prompt_number, located.image_number))
    page_down, row = divmod(line, _GRID_ROWS)
    page_right, column = divmod(located.digits[0], _COLUMNS)

    def make() -> Sheet:
        return Sheet(title=(_NAMES.get(axis.name, axis.name),), column_headers=_headers(axis, page_right, _COLUMNS))

    sheet = book.page((page_down, page_right), make)
    if sheet is not None:
        sheet.row_headers[row] = "" if _gives_prompts(axis) else _clip(located.row["prompt"])
        sheet.cells[row, column] = _cell(located.row, axes)
    return sheet is not None


def _place_on_page(book: _Book, located: _Located, axes: Sequence[Axis]) -> bool:
    """Two axes or more: the sample goes onto a page of its prompt and its values of the outer axes."""
    *outer, down, across = axes
    *outer_digits, digit_down, digit_across = located.digits
    page_down, row = divmod(digit_down, _GRID_ROWS)
    page_right, column = divmod(digit_across, _COLUMNS)

    def make() -> Sheet:
        headers = _headers(across, page_right, _COLUMNS)
        width = max(3, len(headers)) * 200
        fixed = [_label(axis, axis.values[digit]) for axis, digit in zip(outer, outer_digits, strict=True)]
        if located.image_number:
            fixed.append(f"image {located.image_number + 1}")
        several = _gives_prompts(down) or _gives_prompts(across)
        title = [] if several else wrap(_clip(located.row["prompt"]), TITLE_SIZE, width, 2, book.lettering)
        return Sheet(
            title=(*title, *([", ".join(fixed)] if fixed else [])),
            column_headers=headers,
            row_headers=dict(enumerate(_headers(down, page_down, _GRID_ROWS))),
        )

    key = (located.prompt_number, located.image_number, tuple(outer_digits), page_down, page_right)
    sheet = book.page(key, make)
    if sheet is not None:
        sheet.cells[row, column] = _cell(located.row, axes)
    return sheet is not None


def _plain_sheets(rows: Iterator[Mapping[str, Any]], max_sheets: int, lettering: Lettering | None) -> list[Sheet]:
    sheets: list[Sheet] = []
    per_page = _PLAIN_COLUMNS * _PLAIN_ROWS
    for number, row in enumerate(itertools.islice(rows, max_sheets * per_page)):
        page, place = divmod(number, per_page)
        if page == len(sheets):
            sheets.append(Sheet(title=(), caption_lines=_PLAIN_CAPTION + 1))
        prompt = wrap(_clip(row["prompt"]), CAPTION_SIZE, TILE, _PLAIN_CAPTION, lettering)
        sheets[page].cells[divmod(place, _PLAIN_COLUMNS)] = _cell(row, (), tuple(prompt))
    for number, sheet in enumerate(sheets, start=1):
        sheet.title = (f"page {number} of {len(sheets)}",) if len(sheets) > 1 else ()
    return sheets


def _cell(row: Mapping[str, Any], axes: Sequence[Axis], caption: tuple[str, ...] = ()) -> Cell:
    """Only pictures that passed the safety check are shown, also where flagged ones were kept."""
    number = int(row["sample_id"])
    seed = "" if any(axis.name == "seed" for axis in axes) else f", seed {row['seed']}"
    score = row["nsfw_score"]
    detail = row["error"] or ("" if score is None else f"safety score {score:.2f}")
    return Cell(
        row={name: row[name] for name in PICTURE_FIELDS} if row["status"] == "ok" else None,
        status=row["status"],
        detail=str(detail)[:_TEXT_LIMIT],
        caption=(*caption, f"#{number}{seed}"),
    )


def _gives_prompts(axis: Axis) -> bool:
    """Whether prompts differ along the axis, so that no one of them is a title."""
    return any(name.startswith("prompt") for name in axis.name.split(TOGETHER))


def _headers(axis: Axis, page: int, per_page: int) -> tuple[str, ...]:
    return tuple(_label(axis, value) for value in axis.values[page * per_page : (page + 1) * per_page])


def _label(axis: Axis, value: Any) -> str:
    return str(value) if TOGETHER in axis.name else named(axis.name, value)


def named(name: str, value: Any) -> str:
    """A value of an axis as headers say it, by the axis's short name."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)[:_TEXT_LIMIT]
    return f"{_NAMES.get(name, lora_of_axis(name) or name)} {shown}"


def _clip(text: str) -> str:
    return text[:_TEXT_LIMIT]
