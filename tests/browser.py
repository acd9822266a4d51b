"""A headless Chromium for tests, where there is one."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser object on the machine's own Chromium; skips the test where either is
    missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the page is not looked at"
    )
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on this machine: the page is not looked at")
    with playwright.sync_playwright() as started:
        # Root in a container has no sandbox; the pages are our own.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def watched(page: Any) -> list[str]:
    """Collects what goes wrong on a page: console errors and warnings, exceptions, requests that
    leave it."""
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    return wrong
