"""A report page in headless Chromium, for tests and benchmarks. Playwright is imported on use."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Commands that start a browser; Debian's is the first."""

MOST_MS = 180_000
"""Longest wait for anything, on machines that do much else."""


def missing() -> str | None:
    """The part that a browser test lacks on this machine; None if it can run."""
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "needs Playwright: pip install '.[dev]'"
    if not any(map(shutil.which, NAMES)):
        return "needs Chromium: apt-get install chromium"
    return None


@contextmanager
def open_page(path: Path, **options: Any) -> Iterator[Any]:
    """A page of Playwright that shows a file. Raises RuntimeError for an error on its console.

    options: `width`, `height`, and those of a Playwright context, such as `color_scheme`.
    """
    from playwright.sync_api import sync_playwright

    size: Any = {"width": options.pop("width", 1280), "height": options.pop("height", 900)}
    command = next(filter(None, map(shutil.which, NAMES)))
    errors: list[str] = []
    with sync_playwright() as driver:
        # Chromium's sandbox needs rights that root in a container has not.
        browser = driver.chromium.launch(executable_path=command, args=["--no-sandbox"])
        page = browser.new_context(viewport=size, **options).new_page()
        page.set_default_timeout(MOST_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: errors.append(line.text) if line.type in ("error", "warning") else None,
        )
        page.goto(path.resolve().as_uri())
        yield page
        browser.close()
    if errors:
        raise RuntimeError(f"{path.name} wrote to the console: {'; '.join(errors)}")
