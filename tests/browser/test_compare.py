"""The page of pairs in a real Chromium: what a person does with it, and what strangers' texts try to do to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.show.comparison import compare_outputs
from tests.browser.test_gallery import HOSTILE
from tests.harness.models import write_tiny_model
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import FakeEngine

pytestmark = pytest.mark.browser

Open = Callable[..., Page]


class LaterEngine(FakeEngine):
    """All pictures are darker than before."""

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        result = super()._result(request, slot)
        assert result.pixels is not None
        return replace(result, pixels=result.pixels // 2)


def later_engine(plan: Plan, device: str) -> LaterEngine:
    return LaterEngine(batch_size=plan.batch_size)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile prompts, each with two seeds, which all changed; one prompt is gone, and one is new."""
    folder = tmp_path_factory.mktemp("compared")
    model = write_tiny_model(folder / "model")
    for name, last, options in (("before", "gone", {}), ("after", "new", {"engine_factory": later_engine})):
        rows: list[dict[str, Any]] = [{"prompt": prompt, "id": prompt[:80]} for prompt in HOSTILE]
        manifest = folder / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": last}]))
        run(job_spec(model, manifest, folder / name, sweep={"seed": [1, 2]}), **options)
    compare_outputs(str(folder / "before"), str(folder / "after"), str(folder / "page"), top=200)
    return folder / "page/compare.html"


def test_a_pair_is_found_opened_and_flipped(open_page: Open, compared: Path):
    page = open_page(compared.as_uri())
    expect(page.locator("#counts li")).to_have_text(["0identical", f"{2 * len(HOSTILE)}changed", "2new", "2gone"])
    expect(page.locator("#shown")).to_contain_text(f"{2 * len(HOSTILE)} of {2 * len(HOSTILE)} pairs")
    page.locator("#search").fill("family")
    expect(page.locator("#pairs > li")).to_have_count(2)
    about = page.locator("#pairs .about").evaluate_all("lines => lines.map(line => line.textContent)")
    assert sorted("seed 1" in line for line in about) == [False, True], "what tells the pairs apart is said"
    page.locator("#pairs button.trio").first.click()
    viewer, picture = page.locator("#viewer"), page.locator("#picture")
    expect(viewer).to_be_visible()
    after = picture.get_attribute("src")
    page.keyboard.press("Space")
    before = picture.get_attribute("src")
    assert ("-after-" in str(after), "-before-" in str(before)) == (True, True)
    page.keyboard.press("Space")
    assert picture.get_attribute("src") == after
    page.keyboard.press("d")
    assert "-difference-" in str(picture.get_attribute("src"))
    expect(page.locator("#previous")).to_be_disabled()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#next")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_strangers_texts_stay_texts(open_page: Open, compared: Path):
    page = open_page(compared.as_uri())
    expect(page.locator("#pairs > li")).to_have_count(2 * len(HOSTILE))
    for number in range(2 * len(HOSTILE)):
        page.locator("#pairs button.trio").nth(number).click()
        expect(page.locator("#viewer")).to_be_visible()
        page.keyboard.press("Escape")
    for rows in ("#added", "#removed"):
        page.locator(f"{rows} summary").click()
        expect(page.locator(f"{rows} tbody tr")).to_have_count(2)
    assert page.evaluate("document.querySelectorAll('main img[src=x], main script, main svg[onload]').length") == 0


def test_on_a_telephone_nothing_is_wider_than_the_screen(open_page: Open, compared: Path):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    page = open_page(compared.as_uri(), **phone)
    page.locator("#pairs button.trio").first.wait_for()
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    page.locator("#pairs button.trio").first.tap()
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 390
