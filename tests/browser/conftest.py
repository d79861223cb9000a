"""A page of the project in a real Chromium, and everything that it complains about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.harness.browser import find_chromium

_WATCH = (
    "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective))"
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests; each page has a context of its own."""
    program = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@dataclass
class Watched:
    """What a page did that none of ours may do."""

    complaints: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.add_init_script(_WATCH)
        page.on("console", lambda message: self._note(f"console {message.type}: {message.text}", message.type))
        page.on("pageerror", lambda error: self._note(f"error: {error}"))
        page.on("dialog", lambda dialog: (self._note(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _note(self, text: str, kind: str = "error") -> None:
        if kind in {"error", "warning"}:
            self.complaints.append(text)


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a context with these options. Afterwards nothing may have gone wrong on it.

    `complains=True` is for a page of which files are missing: the console then says so.
    """
    opened: list[tuple[BrowserContext, Page, Watched, bool]] = []

    def open_it(address: str, *, complains: bool = False, **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(30_000)
        page, watched = context.new_page(), Watched()
        watched.watch(page)
        opened.append((context, page, watched, complains))
        page.goto(address)
        return page

    yield open_it
    for context, page, watched, complains in opened:
        violations, hit = page.evaluate("[window.violations, window.hit ?? null]")
        context.close()
        assert (violations, hit) == ([], None)
        assert complains or watched.complaints == []
