"""The site in a real browser: it says nothing on the console, fetches nothing, and can be read.

Skipped where there is no Chromium (CHROMIUM names one that is not on the path) or no mkdocs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.docs.test_site import mkdocs
from tests.report.browser import Browser, find_chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium here"),
]
LEAST = 4.5
"""Contrast of text that WCAG 2 asks for (level AA)."""
CONTRASTS = """
[...document.querySelectorAll('.drawing text')].map(text => {
  const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
  const under = [...text.closest('svg').querySelectorAll('rect, circle')].filter(shape => {
    const r = shape.getBoundingClientRect();
    return r.left <= x && x <= r.right && r.top <= y && y <= r.bottom;
  }).pop();
  const page = getComputedStyle(document.body).backgroundColor;
  const back = under ? getComputedStyle(under).fill : page;
  const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [light(getComputedStyle(text).fill), light(back)].sort((p, q) => q - p);
  return [text.textContent, (a + 0.05) / (b + 0.05), getComputedStyle(text).fill];
})
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address where it is served."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs("--no-strict", "--site-dir", str(folder))  # warnings are test_site's
    assert done.returncode == 0, done.stderr[-3000:]
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    assert program is not None
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser: Browser) -> Browser:
    browser.messages.clear()
    browser.requests.clear()
    return browser


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "structure.html"])
def test_drawings_can_be_read_in_light_and_in_dark(
    tab: Browser, site: str, name: str, dark: bool
) -> None:
    tab.open(f"{site}/{name}", dark=dark)
    assert tab.messages == []
    assert [url for url in tab.requests if not url.startswith((site, "data:"))] == []
    found = tab.run(CONTRASTS)
    assert len(found) > 15
    assert [(words, contrast) for words, contrast, _ in found if contrast < LEAST] == []
    assert ("rgb(29, 43, 38)" in {ink for _, _, ink in found}) is not dark


def test_a_drawing_follows_the_page_where_the_system_says_otherwise(
    tab: Browser, site: str
) -> None:
    tab.open(f"{site}/structure.html", dark=False)
    before = {ink for _, _, ink in tab.run(CONTRASTS)}
    tab.run("document.body.setAttribute('data-md-color-scheme', 'slate')")
    after = {ink for _, _, ink in tab.run(CONTRASTS)}
    assert before.isdisjoint(after)


@pytest.mark.parametrize("width", [390, 820, 1300])
@pytest.mark.parametrize("name", ["index", "structure", "performance", "api/models", "support"])
def test_nothing_hangs_over_the_edge(tab: Browser, site: str, name: str, width: int) -> None:
    tab.open(f"{site}/{name}.html", width=width)
    over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.run(over) <= 0


def test_searching_finds_a_page(tab: Browser, site: str) -> None:
    tab.open(f"{site}/index.html")
    waited(tab, "!!window.component$")
    tab.run(
        "(() => { const box = document.querySelector('.md-search__input'); box.focus();"
        "box.value = 'hotswap'; box.dispatchEvent(new Event('keyup')); })()"
    )
    waited(tab, "document.querySelectorAll('.md-search-result__link').length > 0")
    links = tab.run(
        "[...document.querySelectorAll('.md-search-result__link')].map(a => a.pathname)"
    )
    assert "/serving.html" in links
    assert [url for url in tab.requests if not url.startswith((site, "data:", "blob:"))] == []


def waited(tab: Browser, condition: str) -> None:
    """Until it holds in the page."""
    end = time.monotonic() + 30
    while not tab.run(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.1)


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site and says nothing."""

    def log_message(self, *_: object) -> None:
        pass
