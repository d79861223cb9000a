from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.axes import Axis, joined_axis
from latentmill.jobs.show import fonts
from latentmill.jobs.show.dataset_views import show_report
from latentmill.jobs.show.report import report
from latentmill.jobs.show.sheet_pages import named
from latentmill.jobs.show.sheet_pages import plan_sheets as plan_any_sheets
from latentmill.jobs.show.sheets import CAPTION_SIZE, TILE, Cell, Sheet, draw_sheet, wrap
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run

GUIDANCE = Axis(name="guidance_scale", values=(3.0, 5.1, 7.5))
SEED = Axis(name="seed", values=(0, 1))
SAMPLER = Axis(name="sampler", values=("ddim", "plms"))


def rows(prompts: list[str], axes: tuple[Axis, ...] = (), num_images: int = 1) -> list[dict]:
    """Published rows as the plan would order them: by prompt, axes (the last fastest), image."""
    made: list[dict] = []
    for number, prompt in enumerate(prompts):
        for place in np.ndindex(*(len(axis.values) for axis in axes)):
            for _ in range(num_images):
                values = {"guidance_scale": 4.0, "seed": 100 + len(made), "sampler": "ddim"}
                values |= {axis.name: axis.values[digit] for axis, digit in zip(axes, place, strict=True)}
                values["guidance_scale"] = float(np.float32(values["guidance_scale"]))
                made.append(
                    {
                        **values,
                        "sample_id": f"{len(made):08d}",
                        "row_id": str(number),
                        "prompt": prompt,
                        "negative_prompt": "",
                        "status": "ok",
                        "error": None,
                        "nsfw_score": 0.01,
                        "image": f"images/{len(made)}.png",
                        "bytes": 5,
                        "sha256": "0" * 64,
                        "width": 64,
                        "height": 64,
                    }
                )
    return made


def plan_sheets(made, axes: tuple[Axis, ...], max_sheets: int, num_images: int = 1) -> list[Sheet]:
    prompts = 50 if not isinstance(made, list) else len({row["prompt"] for row in made})
    return plan_any_sheets(iter(made), itertools.repeat(num_images, prompts), axes, max_sheets)


def pictures(sheet: Sheet) -> dict[tuple[int, int], str | None]:
    return {place: cell.row and cell.row["image"].removeprefix("images/") for place, cell in sheet.cells.items()}


def test_without_axes_prompts_lie_side_by_side_with_their_own_captions():
    (sheet,) = plan_sheets(rows(["a cat", "a dog"]), (), 5)
    assert pictures(sheet) == {(0, 0): "0.png", (0, 1): "1.png"}
    assert sheet.cells[0, 1].caption == ("a dog", "#1, seed 101")
    assert sheet.column_headers == ()


def test_plain_sheets_are_paged_and_capped():
    sheets = plan_sheets(rows([f"p{number}" for number in range(100)]), (), 3)
    assert [len(sheet.cells) for sheet in sheets] == [30, 30, 30]
    assert [sheet.title for sheet in sheets][1] == ("page 2 of 3",)
    assert pictures(sheets[2])[4, 5] == "89.png"


def test_one_axis_gives_columns_and_a_line_for_each_prompt():
    (sheet,) = plan_sheets(rows(["a cat", "a dog"], (GUIDANCE,)), (GUIDANCE,), 5)
    assert sheet.column_headers == ("guidance 3", "guidance 5.1", "guidance 7.5")
    assert sheet.row_headers == {0: "a cat", 1: "a dog"}
    assert pictures(sheet) == {(row, column): f"{3 * row + column}.png" for row in range(2) for column in range(3)}
    assert sheet.cells[1, 2].caption == ("#5, seed 105",)


def test_two_axes_give_a_page_for_each_prompt():
    axes = (GUIDANCE, SEED)
    cat, dog = plan_sheets(rows(["a cat", "a dog"], axes), axes, 5)
    assert (cat.title, dog.title) == (("a cat",), ("a dog",))
    assert cat.row_headers == {0: "guidance 3", 1: "guidance 5.1", 2: "guidance 7.5"}
    assert cat.column_headers == ("seed 0", "seed 1")
    assert pictures(dog) == {(row, column): f"{6 + 2 * row + column}.png" for row in range(3) for column in range(2)}
    assert dog.cells[0, 0].caption == ("#6",)


def test_outer_axes_and_further_images_get_pages_of_their_own():
    axes = (SAMPLER, GUIDANCE, SEED)
    sheets = plan_sheets(rows(["a cat"], axes, num_images=2), axes, 10, num_images=2)
    titles = ["sampler ddim", "sampler ddim, image 2", "sampler plms", "sampler plms, image 2"]
    assert [sheet.title[-1] for sheet in sheets] == titles
    assert all(len(sheet.cells) == 6 for sheet in sheets)
    assert pictures(sheets[3])[2, 1] == "23.png"


def test_an_axis_of_one_value_needs_no_column():
    axes = (Axis(name="guidance_scale", values=(3.0,)),)
    (sheet,) = plan_sheets(rows(["a cat"], axes), axes, 5)
    assert sheet.column_headers == ()


def test_columns_of_axes_that_vary_together_say_each_ones_value_and_loras_their_names():
    together = tuple(Axis(name=f"lora.{name}", values=(0.0, 0.5)) for name in ("sepia", "ink"))
    axes = (GUIDANCE, joined_axis(together, named))
    (sheet,) = plan_sheets(rows(["a cat"], axes), axes, 5)
    assert sheet.column_headers == ("sepia 0, ink 0", "sepia 0.5, ink 0.5")


def test_long_axes_and_many_prompts_go_on_on_further_pages():
    axes = (Axis(name="seed", values=tuple(range(10))),)
    made = rows([f"p{number}" for number in range(9)], axes)
    sheets = plan_sheets(made, axes, 100)
    assert sorted(len(sheet.cells) for sheet in sheets) == [2, 8, 16, 64]
    assert sum(len(sheet.cells) for sheet in sheets) == len(made)
    assert {header for sheet in sheets for header in sheet.column_headers} == {f"seed {n}" for n in range(10)}


def test_the_cap_holds_and_reading_stops_soon_after_it():
    axes = (GUIDANCE, SEED)
    taken = 0

    def counted():
        nonlocal taken
        for row in rows([f"p{number}" for number in range(50)], axes):
            taken += 1
            yield row

    assert len(plan_sheets(counted(), axes, 2)) == 2
    assert taken <= 4 * 6


def test_only_pictures_that_are_ok_are_shown():
    made = rows(["a", "b", "c"])
    made[1] |= {"status": "flagged", "nsfw_score": 0.93}
    made[2] |= {"status": "failed", "error": "not finite", "nsfw_score": None, "image": None}
    (sheet,) = plan_sheets(made, (), 1)
    shown = [cell.row and cell.row["image"] for cell in sheet.cells.values()]
    assert shown == ["images/0.png", None, None]
    assert [cell.detail for cell in sheet.cells.values()][1:] == ["safety score 0.93", "not finite"]


def test_wrapping_fits_breaks_long_words_and_marks_what_is_cut():
    assert wrap("a red circle", CAPTION_SIZE, 500, 2) == ["a red circle"]
    lines = wrap("one two three four five six seven eight nine ten " * 3, CAPTION_SIZE, 100, 2)
    assert len(lines) == 2
    assert lines[1].endswith("...")
    assert len(wrap("x" * 500, CAPTION_SIZE, 100, 3)) == 3
    assert wrap("\x1b[2J\u202e", CAPTION_SIZE, 500, 1) == ["\\x1b[2J\\u202e"]
    assert wrap("", CAPTION_SIZE, 100, 2) == []


def test_a_drawn_sheet_has_each_picture_in_its_place_and_tiles_for_the_rest():
    cells = {
        (0, 0): Cell(row={"image": "green"}, status="ok", detail="", caption=("#0",)),
        (0, 1): Cell(row={"image": "gone"}, status="ok", detail="", caption=("#1",)),
        (1, 0): Cell(row=None, status="flagged", detail="safety score 0.93", caption=("#2",)),
        (1, 1): Cell(row={"image": "wide"}, status="ok", detail="", caption=("#3",)),
    }
    known = {"green": np.full((64, 64, 3), (0, 200, 0), np.uint8), "wide": np.full((64, 512, 3), (9, 9, 9), np.uint8)}
    page = np.asarray(draw_sheet(Sheet(title=("t",), cells=cells), lambda row: known.get(row["image"]), tile=TILE))
    green = np.argwhere((page == (0, 200, 0)).all(axis=2))
    assert green.shape[0] == 64 * 64  # never enlarged
    assert (page == (254, 226, 226)).all(axis=2).sum() > 0.8 * TILE**2  # unreadable
    assert (page == (254, 243, 199)).all(axis=2).sum() > 0.8 * TILE**2  # flagged
    dark = np.argwhere((page == (9, 9, 9)).all(axis=2))
    assert dark.max(axis=0)[1] - dark.min(axis=0)[1] + 1 == TILE


def sheets(storage: Storage) -> list[str]:
    return sorted(path for path, _ in storage.list("report") if path.endswith(".png"))


@pytest.fixture
def finished(tiny_model: Path, manifest, tmp_path: Path) -> str:
    out = str(tmp_path / "out")
    prompts = manifest(["a cat", "poison", "nsfw"])
    run(job_spec(tiny_model, prompts, out, sweep={"guidance_scale": [3, 5.1], "seed": [1, 2]}))
    return out


def test_a_report_of_a_real_output_lies_beside_it_and_replaces_the_last_one(finished: str):
    storage = Storage.open(finished)
    storage.write("report/sheet-0009.png", b"old")
    summary = report(finished)
    assert summary.sheets == ("report/sheet-0001.png", "report/sheet-0002.png", "report/sheet-0003.png")
    assert (summary.samples_shown, summary.samples) == (12, 12)
    assert sheets(storage) == list(summary.sheets)
    first = np.asarray(Image.open(io.BytesIO(storage.read(summary.sheets[0]))))
    assert first.std() > 20
    assert report(finished, max_sheets=1).samples_shown == 4
    assert report(finished, max_sheets=0).sheets == ()
    assert sheets(storage) == []


def test_the_command_says_which_characters_are_boxes_on_the_sheets(
    tiny_model: Path, manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(fonts, "_installed", tuple)
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["a \u4e2d\u6587 cat"]), out))
    summary = report(out)
    assert summary.without_glyph == "\u4e2d\u6587"
    show_report(summary)
    assert "2 characters are boxes on the sheets (U+4E2D U+6587)" in " ".join(capsys.readouterr().out.split())


def test_a_report_on_s3(tiny_model: Path, manifest, s3: str):
    run(job_spec(tiny_model, manifest(3), s3))
    assert report(s3).sheets == ("report/sheet-0001.png",)
    assert Storage.open(s3).read("report/sheet-0001.png").startswith(b"\x89PNG")


def test_what_cannot_be_reported_says_why(finished: str, tmp_path: Path):
    with pytest.raises(UsageError, match="has no plan"):
        report(str(tmp_path / "nothing"))
    for wrong in ({"max_sheets": -1}, {"max_pictures": 0}, {"thumbnail": 8}):
        with pytest.raises(UsageError, match="give"):
            report(finished, **wrong)
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(UsageError, match="is no font"):
        report(finished, font=str(tmp_path / "font.ttf"))
    assert not (Path(finished) / "report").exists()
    part = next((Path(finished) / "dataset").glob("part-*.parquet"))
    part.unlink()
    with pytest.raises(JobError, match=r"is damaged.*latentmill repair"):
        report(finished)


def test_an_unfinished_output_has_a_gallery_and_no_sheets(finished: str):
    (Path(finished) / "_job/dataset.json").unlink()
    summary = report(finished)
    assert (summary.gallery.state, summary.gallery.rows, summary.sheets) == ("running", 12, ())
