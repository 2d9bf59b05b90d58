"""A served studio, a browser, and pages that watch what they ask for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from tests.studio.fake_core import FakeCore

CHROMIUM = os.environ.get("TRDQ_CHROMIUM") or shutil.which("chromium")
PATIENCE = int(os.environ.get("TRDQ_PATIENCE", "30000"))  # ms: two cores, shared
# Browser messages that are not about us: superseded pictures, Vega inside gradio, and slow software rendering.
HARMLESS = ("ERR_ABORTED", "vega", "WebGL", "GPU stall", "favicon")
# A failing test says which presses its page heard, and on what.
PRESSES = """
window.heardPresses = [];
for (const kind of ["pointerdown", "pointerup", "click"])
    document.addEventListener(kind, (event) => {
        const on = event.target, place = on.closest?.("[id]")?.id, words = (on.innerText || "").slice(0, 30);
        window.heardPresses.push(`${Math.round(performance.now())} ${kind} ${on.tagName} in #${place} ${words}`);
    }, true);
"""


@dataclass
class Visit:
    """A page with what went wrong on it and whom it asked."""

    page: Any
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    traffic: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Nothing left this machine, and nothing broke in the browser."""
        assert self.hosts <= {"127.0.0.1", ""}, f"asked {self.hosts}"
        assert not self.errors, self.errors


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the pages go: TRDQ_SCREENSHOTS, else pytest's temporary folder."""
    named = os.environ.get("TRDQ_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def serve(core: Any) -> tuple[Any, str]:
    """A studio over `core` on a free port: the Blocks and the address."""
    from studio.app import build, launch_options

    demo = build(core)
    _, url, _ = demo.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False, **launch_options()
    )
    return demo, url


@pytest.fixture(scope="session")
def fake_core(tmp_path_factory: pytest.TempPathFactory) -> FakeCore:
    """A core with steps long enough to be seen, and to be cancelled."""
    return FakeCore(tmp_path_factory.mktemp("fake"), pace=0.03)


@pytest.fixture(scope="session")
def fake_url(fake_core: FakeCore) -> Iterator[str]:
    """The address of a studio over the fake core."""
    demo, url = serve(fake_core)
    yield url
    demo.close()


@pytest.fixture(scope="session")
def real_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a studio over the real core. A pipeline with random weights stands in if the pocket model is not there."""
    from studio.services.core import InstalledCore
    from trdq_core import models

    before = models.ASSETS
    if not (before / "pocket-image" / "model_index.json").is_file():
        models.ASSETS = tmp_path_factory.mktemp("assets")
        shutil.copytree(request.getfixturevalue("tiny_folder"), models.ASSETS / "pocket-image")
    core = InstalledCore()
    core.load()
    demo, url = serve(core)
    yield url
    demo.close()
    models.ASSETS = before


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def context(browser: Any) -> Iterator[Any]:
    """One browser profile for all tests, so that gradio's 3 MB of scripts are read once; each page starts forgetful."""
    made = browser.new_context()
    made.set_default_timeout(PATIENCE)
    made.add_init_script(PRESSES)
    made.add_init_script(
        "if (!sessionStorage.getItem('seen')) { localStorage.clear(); sessionStorage.setItem('seen', '1'); }"
    )
    yield made
    made.close()


@pytest.fixture
def visit(context: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a studio at a width, light or dark, and waits until its plan stands there."""
    pages = []
    opened: list[Visit] = []

    def go(url: str, width: int = 1400, dark: bool = False) -> Visit:
        seen = Visit(context.new_page())
        opened.append(seen)
        pages.append(seen.page)
        seen.page.set_viewport_size({"width": width, "height": 900 if width > 600 else 844})
        seen.page.on("request", lambda request: seen.hosts.add(urlparse(request.url).hostname or ""))
        seen.page.on("request", lambda request: _heard(seen, "asked", request))
        seen.page.on("requestfinished", lambda request: _heard(seen, "answered", request))
        seen.page.on("requestfailed", lambda request: _heard(seen, "failed", request))
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("console", lambda message: _note(seen, message))
        seen.page.goto(f"{url}?__theme={'dark' if dark else 'light'}")
        seen.page.wait_for_selector("#plan .tr-cards")
        return seen

    go.opened = opened  # type: ignore[attr-defined]
    yield go
    for page in pages:
        page.close()


def _heard(seen: Visit, what: str, request: Any) -> None:
    address = urlparse(request.url)
    if "/gradio_api/" in address.path and "/file" not in address.path:
        body = (request.post_data or "")[:110] if what == "asked" else ""
        if body.startswith('{"data":[],"fn_index"'):
            return  # the strip's clock
        seen.traffic.append(f"{time.monotonic():.2f} {what} {address.path.rsplit('/gradio_api/')[-1]} {body}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that failed shows what its pages asked for and what they say: it may fail where nobody can look."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" or not report.failed:
        return
    for seen in getattr(getattr(item, "funcargs", {}).get("visit"), "opened", []):
        gone = seen.page.is_closed()
        words = "closed" if gone else " / ".join(seen.page.locator(".tabitem:visible").all_inner_texts())
        presses = [] if gone else seen.page.evaluate("window.heardPresses.slice(-12)")
        told = [*seen.errors, *seen.traffic[-16:], f"{time.monotonic():.2f} now", *presses, words[:900]]
        report.sections.append(("the page", "\n".join(told)))


def _note(seen: Visit, message: Any) -> None:
    if message.type == "error" and not any(word.lower() in message.text.lower() for word in HARMLESS):
        seen.errors.append(message.text)
