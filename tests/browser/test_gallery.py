"""The gallery in a real Chromium: what a person does with it, and what strangers' texts try to do to them."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect

from bench.synthetic import fill_output, write_manifest
from bench.synthetic import job_spec as synthetic_spec
from latentmill.jobs.api import open_dataset
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.publish import publish
from latentmill.jobs.outputs.score import score
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.show.report import report
from latentmill.jobs.store.storage import Storage
from tests.harness.browser import serving
from tests.harness.models import write_tiny_model
from tests.harness.s3 import credentials, seaweedfs, set_identities
from tests.jobs.driver import job_spec, run

pytestmark = pytest.mark.browser

Open = Callable[..., Page]

HOSTILE = [
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 2">',
    "</script><script>window.hit = 3</script>",
    "</title></style></textarea><svg onload=window.hit=4>",
    "javascript:window.hit=5 {{7*7}} ${window.hit=6} `${window.hit=7}`",
    "مرحبا بالعالم \u202egnp.exe\u202c and on",
    "👩‍🚀🏳️‍🌈 a family 👨‍👩‍👧‍👦 of emoji",
    "long " * 2000,
]


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts, four scales, three seeds, of which a third was flagged and a third failed."""
    folder = tmp_path_factory.mktemp("sweep")
    return _make(folder, ["a cat", "nsfw poison dog", "nsfw bird"], on_flagged="keep", num_images=1)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return _make(folder, HOSTILE, sweep={})


def _make(folder: Path, prompts: list[str], **settings: object) -> Path:
    manifest = folder / "prompts.jsonl"
    manifest.write_text("".join(json.dumps({"prompt": prompt, "negative_prompt": prompt}) + "\n" for prompt in prompts))
    axes = {"sweep": {"guidance_scale": [1.5, 3, 5.1, 7.5], "seed": [1, 2, 3]}}
    out = folder / "out"
    run(job_spec(write_tiny_model(folder / "model"), manifest, out, chunk_size=16, **{**axes, **settings}))
    score(str(out), ["sharpness"], ScoreSpec())
    report(str(out))
    return out


@pytest.fixture(params=["file", "http"])
def address(request: pytest.FixtureRequest, sweep: Path) -> Iterator[str]:
    """The page from the disk, and from a server."""
    if request.param == "file":
        yield page_of(sweep)
        return
    with serving(sweep.parent) as url:
        yield f"{url}/out/report/index.html"


def page_of(out: Path) -> str:
    return (out / "report/index.html").as_uri()


def tiles(page: Page):
    return page.locator("button.tile")


def as_tiles(page: Page) -> Page:
    page.get_by_role("button", name="Gallery").click()
    return page


def shown(page: Page) -> list[int]:
    """The numbers of the samples on the screen, in order."""
    texts = page.locator("button.tile").evaluate_all(
        "tiles => tiles.sort((a, b) => a.dataset.index - b.dataset.index).map(t => t.getAttribute('aria-label'))"
    )
    return [int(re.match(r"Sample (\d+)", text)[1]) for text in texts]


def until(page: Page, expression: str) -> None:
    """Waits in this process: Playwright's own way compiles a text in the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within ten seconds: {expression}")


def count(page: Page, text: str) -> None:
    expect(page.locator("#count")).to_have_text(text)


def facet(page: Page, name: str):
    part = page.locator("#filters details", has=page.locator(f"summary:text-is('{name}')"))
    if part.get_attribute("open") is None:
        part.locator("summary").click()
    return part


def test_it_opens_from_a_file_and_from_a_server(open_page: Open, address: str):
    page = open_page(address)
    expect(page).to_have_title("out · latentmill")
    count(page, "12 of 36 samples")
    as_tiles(page)
    count(page, "36 samples")
    until(page, "[...document.querySelectorAll('.tile img')].slice(0, 4).every(i => i.naturalWidth === 64)")
    assert shown(page)[:4] == [0, 1, 2, 3]
    tiles(page).first.click()
    expect(page.locator(".picture img[data-full]")).to_be_visible()
    assert page.evaluate("document.querySelector('.picture img').src").endswith(".png")


@pytest.mark.s3
def test_it_opens_at_a_bucket_s_own_address(open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The store says what each file is; with a wrong type, Chromium would save the page and refuse the styles."""
    (tmp_path / "store").mkdir()
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    with seaweedfs(tmp_path / "store") as url:
        set_identities(tmp_path / "store", [{"name": "anonymous", "actions": ["Read:test"]}])
        for name, value in credentials(url).items():
            monkeypatch.setenv(name, value)
        run(job_spec(write_tiny_model(tmp_path / "model"), tmp_path / "prompts.txt", "s3://test/birds"))
        report("s3://test/birds")
        page = open_page(f"{url}/test/birds/report/index.html")
        count(page, "2 samples")
        until(page, "[...document.querySelectorAll('.tile img')].every(i => i.naturalWidth === 64)")
        assert page.evaluate("getComputedStyle(document.querySelector('.tile')).position") == "absolute"
        tiles(page).first.click()
        expect(page.locator(".picture img[data-full]")).to_be_visible()
        expect(page.locator("#lightbox")).to_contain_text("latentmill regenerate s3://test/birds --sample 0")


def test_a_sweep_of_two_axes_begins_as_a_grid_and_its_pages_are_turned(open_page: Open, sweep: Path):
    page = open_page(page_of(sweep))
    expect(page.locator("#axis-x")).to_have_value("seed")
    expect(page.locator("#axis-y")).to_have_value("guidance_scale")
    expect(page.locator(".heads.top .head")).to_have_text(["seed 1", "seed 2", "seed 3"])
    expect(page.locator(".heads.left .head")).to_have_text(
        [f"guidance {scale}" for scale in ("1.5", "3", "5.1", "7.5")]
    )
    assert shown(page) == list(range(12))
    page.keyboard.press("]")
    expect(page.locator("#page option:checked")).to_have_text("nsfw poison dog")
    assert shown(page) == list(range(12, 24))
    page.keyboard.press("[")
    expect(page.locator("#page option:checked")).to_have_text("a cat")
    page.locator("#axis-z").select_option("")
    expect(page.locator(".more").first).to_have_text("+2")
    page.locator("#axis-x").select_option("prompt")
    page.locator("#axis-y").select_option("status")
    expect(page.locator(".heads.left .head")).to_have_text(["status ok", "status failed", "status flagged"])
    expect(page.locator(".tile.empty")).to_have_count(6)


def test_filters_of_every_kind(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    facet(page, "guidance_scale").get_by_label("5.1").check()
    count(page, "9 of 36 samples")
    facet(page, "seed").get_by_label("2").check()
    count(page, "3 of 36 samples")
    expect(facet(page, "seed").locator(".amount")).to_have_text(["3", "3", "3"])
    page.locator(".chip", has_text="guidance_scale").click()
    count(page, "12 of 36 samples")
    expect(facet(page, "guidance_scale").get_by_label("5.1")).not_to_be_checked()
    page.locator(".chip").click()
    facet(page, "sample").get_by_label("least").fill("30")
    facet(page, "sample").get_by_label("most").fill("33.5")
    count(page, "4 of 36 samples")
    facet(page, "sample").get_by_label("least").fill("")
    count(page, "34 of 36 samples")
    page.locator(".chip").click()
    page.locator("#statuses").get_by_text("12 failed").click()
    count(page, "12 of 36 samples")
    assert shown(page)[0] == 12
    expect(tiles(page).first).to_contain_text("this prompt is poison")


def test_files_and_digests_can_be_filtered_once_they_are_asked_for(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.get_by_role("button", name="Filter by files and digests").click()
    image = next((sweep / "images").rglob("*05.png"))
    facet(page, "image").get_by_label("contains").fill(image.name)
    count(page, "1 of 36 samples")
    assert shown(page) == [5]


def test_search_and_its_empty_state(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.keyboard.press("/")
    page.keyboard.type("BIRD nsfw")
    count(page, "12 of 36 samples")
    page.locator("#search").fill("#7")
    count(page, "1 of 36 samples")
    page.locator("#search").fill("no such thing")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()
    page.get_by_role("button", name="Clear search and filters").click()
    count(page, "36 samples")
    expect(page.locator("#search")).to_have_value("")


def test_order_by_numbers_and_texts_both_ways(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.locator("#sort").select_option("guidance_scale")
    assert shown(page)[:4] == [0, 1, 2, 12]
    page.get_by_label("Ascending").click()
    assert shown(page)[:4] == [9, 10, 11, 21]
    expect(tiles(page).first).to_contain_text("guidance 7.5")
    page.locator("#sort").select_option("prompt")
    assert shown(page)[0] == 12
    page.locator("#sort").select_option("nsfw_score")
    page.locator("#scroller").evaluate("element => element.scrollTo(0, element.scrollHeight)")
    expect(page.locator(".tile[data-index='35']")).to_be_attached()
    assert shown(page)[-1] == 23  # those without a score come last, in either direction


def test_scores_filter_sort_and_show(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.locator("#sort").select_option("sharpness")
    page.get_by_label("Ascending").click()
    scores = open_dataset(str(sweep)).table(["sample_id", "sharpness"]).to_pylist()
    second, first = sorted((row for row in scores if row["sharpness"] is not None), key=lambda row: row["sharpness"])[
        -2:
    ]
    assert shown(page)[0] == int(first["sample_id"])
    expect(tiles(page).first).to_contain_text(f"sharpness {first['sharpness']:.4g}")
    facet(page, "sharpness").get_by_label("least").fill(str((first["sharpness"] + second["sharpness"]) / 2))
    count(page, "1 of 36 samples")
    tiles(page).first.click()
    expect(page.locator("#lightbox")).to_contain_text("sharpness")


def test_a_link_shows_what_was_shown(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    facet(page, "guidance_scale").get_by_label("3").check()
    page.locator("#search").fill("cat")
    page.locator("#sort").select_option("seed")
    count(page, "3 of 36 samples")
    again = open_page(page.url)
    count(again, "3 of 36 samples")
    expect(again.locator("#sort")).to_have_value("seed")
    expect(again.locator("#search")).to_have_value("cat")
    cut = open_page(page.url[: page.url.index("filters=") + 12])
    count(cut, "12 of 36 samples")


def test_one_picture_with_all_that_is_known_of_it(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep), permissions=["clipboard-read", "clipboard-write"]))
    tiles(page).nth(4).click()
    box = page.locator("#lightbox")
    row = next(row for row in _published(sweep) if row["sample_id"] == "00000004")
    for text in ("Sample 4", "a cat", "guidance_scale", row["sha256"], row["image"], row["execution_class"]):
        expect(box).to_contain_text(text)
    box.get_by_role("button", name="Copy command").click()
    expect(box.locator("[data-said=Copied]")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == f"latentmill regenerate {sweep} --sample 4"
    box.get_by_role("button", name="Copy as JSON").click()
    asked = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert (asked["prompt"], asked["guidance_scale"], asked["seed"]) == ("a cat", 3, 2)
    page.keyboard.press("ArrowRight")
    expect(box).to_contain_text("Sample 5")
    page.keyboard.press("End")
    expect(box).to_contain_text("Sample 35")
    expect(box.get_by_label("Picture after")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(box).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.row") == "35"


def test_a_copied_manifest_line_is_one_that_a_job_takes(open_page: Open, hostile: Path, tmp_path: Path):
    page = open_page(page_of(hostile), permissions=["clipboard-read", "clipboard-write"])
    tiles(page).nth(1).click()
    page.locator("#lightbox").get_by_role("button", name="Copy as JSON").click()
    expect(page.locator("[data-said=Copied]")).to_be_visible()
    manifest = tmp_path / "again.jsonl"
    manifest.write_text(page.evaluate("navigator.clipboard.readText()") + "\n")
    with draft_plan(job_spec(hostile.parent / "model", manifest, tmp_path / "again")) as draft:
        assert (draft.summary().rows, draft.summary().rejected_rows) == (1, 0)


def test_a_flagged_picture_is_shown_when_it_is_asked_for_and_a_failure_says_why(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.locator("#statuses").get_by_text("12 flagged").click()
    expect(tiles(page).first).to_contain_text("safety score 0.9")
    tiles(page).first.click()
    picture = page.locator("#lightbox .picture")
    expect(picture.locator("img")).to_have_count(0)
    picture.get_by_role("button", name="Show it").click()
    expect(page.locator(".picture img[data-full]")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(picture.locator("img")).to_have_count(0)
    page.keyboard.press("Escape")
    page.locator("#statuses").get_by_text("12 failed").click()
    tiles(page).first.click()
    expect(page.locator("#lightbox")).to_contain_text("this prompt is poison")


def test_the_keyboard_alone_is_enough(open_page: Open, sweep: Path):
    page = as_tiles(open_page(page_of(sweep)))
    page.locator("#count").click()
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.className") != "tile":
        page.keyboard.press("Tab")
    across = page.evaluate("latentmill.gallery.view.layout.across")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("Number(document.activeElement.dataset.row)") == across + 1
    outline = page.evaluate("getComputedStyle(document.activeElement.querySelector('.frame')).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("End")
    assert page.evaluate("Number(document.activeElement.dataset.row)") == 35
    expect(tiles(page).last).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#lightbox")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    expect(page.locator("#axes")).to_be_visible()
    page.keyboard.press("f")
    expect(page.locator("#filters")).to_be_hidden()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_stranger_s_text_stays_text_everywhere(open_page: Open, hostile: Path, number: int):
    page = open_page(page_of(hostile))
    expect(tiles(page)).to_have_count(len(HOSTILE))
    tiles(page).nth(number).click()
    prompt = page.locator("#lightbox .prompt").first
    expect(page.locator("#lightbox .files")).to_be_attached()
    said = prompt.evaluate("p => { p.querySelectorAll('.steering').forEach(s => s.remove()); return p.textContent; }")
    assert said.strip() == re.sub("[\u202e\u202c]", "", HOSTILE[number]).strip()
    page.keyboard.press("Escape")
    page.locator("#axis-x").evaluate("select => select.options.length")
    facet(page, "prompt").locator("label, input").first.wait_for()
    page.get_by_role("button", name="Axes").click()
    page.locator("#axis-y").select_option("prompt")
    page.locator("#axis-x").select_option("negative_prompt")
    page.locator("#axis-z").select_option("prompt")
    page.locator("#search").fill(HOSTILE[number][:40])
    count(page, f"1 of {len(HOSTILE)} samples")
    assert page.evaluate("document.querySelectorAll('main img[src=x], main script, main svg[onload]').length") == 0


def test_characters_that_steer_are_shown_as_what_they_are(open_page: Open, hostile: Path):
    page = open_page(page_of(hostile))
    tiles(page).nth(5).click()
    expect(page.locator("#lightbox .prompt").first.locator(".steering")).to_have_text(["U+202E", "U+202C"])
    assert page.locator("#lightbox .prompt bdi").first.evaluate("b => getComputedStyle(b).unicodeBidi") == "isolate"


def test_on_a_telephone_nothing_is_wider_than_the_screen(open_page: Open, sweep: Path, hostile: Path):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    for out in (sweep, hostile):
        page = open_page(page_of(out), **phone)
        tiles(page).first.wait_for()
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        direction = page.locator("#direction").bounding_box()
        assert direction["x"] + direction["width"] <= 390
        as_tiles(page)
        assert page.evaluate("latentmill.gallery.view.layout.across") == 2
        page.locator("#filter-button").tap()
        expect(page.locator("#filters")).to_be_in_viewport()
        page.get_by_label("Close filters").tap()
        tiles(page).first.tap()
        box = page.locator("#lightbox").bounding_box()
        assert (box["x"], box["y"], box["width"]) == (0, 0, 390)
        assert page.evaluate("[innerWidth, document.querySelector('#lightbox').scrollWidth]") == [390, 390]


def test_the_theme_is_the_system_s_until_one_says_otherwise(open_page: Open, sweep: Path):
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(page_of(sweep), color_scheme=scheme) for scheme in ("light", "dark"))
    colours = light.evaluate(paper), dark.evaluate(paper)
    assert colours[0] != colours[1]
    dark.locator("#theme").click()
    assert dark.evaluate(paper) == colours[0]
    dark.reload()
    assert dark.evaluate(paper) == colours[0]


def test_files_that_are_missing_are_told_of(open_page: Open, sweep: Path, tmp_path: Path):
    alone = tmp_path / "alone"
    shutil.copytree(sweep / "report", alone / "report")
    page = as_tiles(open_page(page_of(alone), complains=True))
    tiles(page).first.click()
    expect(page.locator("#lightbox")).to_contain_text("this is the thumbnail")
    shutil.rmtree(alone / "report/thumbs")
    page = as_tiles(open_page(page_of(alone), complains=True))
    expect(tiles(page).first).to_contain_text("no thumbnail")
    shutil.rmtree(alone / "report/data")
    page = open_page(page_of(alone), complains=True)
    expect(page.get_by_role("heading", name="This report cannot be read")).to_be_visible()


def test_an_open_page_follows_a_running_job(open_page: Open, sweep: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(sweep, out, ignore=shutil.ignore_patterns("report"))
    manifest, records = out / "_job/dataset.json", sorted((out / "ledger").rglob("*.parquet"))
    published, last = manifest.read_bytes(), records[-1].read_bytes()
    manifest.unlink()
    records[-1].unlink()
    looked, go_on = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        looked.set()
        assert go_on.wait(60)

    writer = threading.Thread(target=report, args=(str(out),), kwargs={"live": True, "sleep": sleep})
    writer.start()
    assert looked.wait(60)
    page = as_tiles(open_page(page_of(out)))
    count(page, "32 of 36 samples")
    expect(page.locator("#state")).to_have_text("running")
    records[-1].write_bytes(last)
    manifest.write_bytes(published)
    go_on.set()
    writer.join(60)
    assert not writer.is_alive()
    expect(page.locator("#count")).to_have_text("36 samples", timeout=30_000)
    expect(page.locator("#state")).to_be_hidden()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five thousand rows, each with a prompt of its own."""
    folder = tmp_path_factory.mktemp("large")
    spec = synthetic_spec(write_manifest(folder / "m.parquet", 5000), folder / "out", chunk_size=500)
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    job = open_job(str(folder / "out"))
    fill_output(job, folder / "out")
    publish(job)
    report(str(folder / "out"), max_sheets=0)
    return folder / "out"


def test_five_thousand_rows_are_as_quick_as_fifty(open_page: Open, large: Path):
    page = open_page(page_of(large))
    count(page, "5,000 samples")
    assert page.locator(".tile").count() < 80
    axes = page.locator("#axis-x option").evaluate_all("options => options.map(option => option.value)")
    assert axes == [""], "each column has one value, or more than a thousand"
    page.locator("#scroller").evaluate("element => element.scrollTo(0, element.scrollHeight)")
    expect(page.locator(".tile[data-index='4999']")).to_be_attached()
    assert page.locator(".tile").count() < 80
    page.locator("#search").fill("collection/4321")
    count(page, "1 of 5,000 samples")
    page.locator("#search").fill("")
    count(page, "5,000 samples")
    page.locator("#sort").select_option("prompt")
    page.get_by_label("Ascending").click()
    assert shown(page)[0] == 4999
    tiles(page).first.click()
    expect(page.locator("#lightbox")).to_contain_text("source")
    page.keyboard.press("Escape")
    taken = page.evaluate("""() => {
        const start = performance.now();
        latentmill.gallery.set({ search: "circle 12" });
        return performance.now() - start;
    }""")
    assert taken < 500


def _published(out: Path) -> list[dict[str, object]]:
    part = next((out / "dataset").glob("part-*.parquet"))
    assert Storage.open(str(out)).exists(f"dataset/{part.name}")
    return pq.read_table(part).to_pylist()
