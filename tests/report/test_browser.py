"""The page in a real browser: it renders, says nothing on the console, and does what it offers.

Skipped where there is no Chromium; CHROMIUM names one that is not on the path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, find_chromium
from tests.report.conftest import write_full

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium here"),
]
FOCUSED = "document.activeElement"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_full(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    found = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser, page) -> Browser:
    browser.messages.clear()
    browser.requests.clear()
    browser.open(page)
    return browser


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_renders_without_a_word_on_the_console_and_fetches_nothing(browser, page, dark):
    browser.messages.clear()
    browser.requests.clear()
    browser.open(page, dark=dark)
    assert browser.messages == []
    assert browser.requests == [page.as_uri()]
    ink, back = browser.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (ink == "rgb(232, 234, 237)") is dark
    assert (back == "rgb(20, 23, 26)") is dark
    assert browser.picture(page.with_suffix(".png")).stat().st_size > 20_000


def test_charts_and_shades_are_drawn(tab):
    boxes = tab.run(
        "[...document.querySelectorAll('.chart polyline, .spark path, .bar .fill')]"
        ".filter(e => !e.closest('details')).map(e => e.getBBox().width)"
    )
    assert len(boxes) > 15
    assert all(width > 0 for width in boxes)
    shades = tab.run(
        "new Set([...document.querySelectorAll('.heat td')]"
        ".map(e => getComputedStyle(e).backgroundColor)).size"
    )
    assert shades >= 4


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_itself_is_never_wider_than_the_window(browser, page, width):
    browser.open(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_the_switch_shows_one_adapter_or_all(tab):
    shown = (
        "[...document.querySelectorAll('[data-adapter]')].filter(e => e.offsetParent)"
        ".map(e => e.dataset.adapter).join('')"
    )
    assert set(tab.run(shown)) == {"0", "1"}
    choose = "(v => {{ const s = document.getElementById('adapter'); s.value = v;" + (
        "s.dispatchEvent(new Event('change')); }})('{}')"
    )
    tab.run(choose.format("1"))
    assert set(tab.run(shown)) == {"1"}
    tab.run(choose.format("all"))
    assert set(tab.run(shown)) == {"0", "1"}


def test_arrow_keys_move_through_a_heat_map_and_say_where_they_are(tab):
    tab.run("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
    said = "document.querySelector('.heat').closest('.scroll').nextElementSibling.textContent"
    assert tab.run(said).startswith("layers.0.up · ‖ΔW‖ ")
    tab.press("ArrowDown")
    assert tab.run(said).startswith("layers.1.up · ‖ΔW‖ ")
    tab.press("ArrowRight")
    assert tab.run(said).startswith("layers.1.down · ")
    tab.press("End")
    assert tab.run(said).startswith("layers.2.down · ")
    tab.press("ArrowDown")  # there is nothing below
    assert tab.run(f"{FOCUSED}.dataset.say").startswith("layers.2.down · ")
    assert (
        tab.run("document.querySelector('.heat').querySelectorAll('[tabindex=\"0\"]').length") == 1
    )


def test_enter_on_a_cell_goes_to_the_sites_own_row(tab):
    tab.run("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
    tab.press("ArrowDown")
    tab.press("Enter")
    assert tab.run(f"{FOCUSED}.tagName + ' ' + {FOCUSED}.cells[0].textContent") == "TR layers.1.up"
    assert tab.run(f"{FOCUSED}.closest('details').open")


def test_a_click_on_a_cell_does_the_same(tab):
    tab.click(".heat tbody tr:nth-child(3) td:nth-of-type(2)")
    assert tab.run(f"{FOCUSED}.cells[0].textContent") == "layers.2.down"


def test_pointing_at_a_cell_says_what_it_is(tab):
    where = tab.run(
        "(() => { const e = document.querySelector('.heat tbody tr:nth-child(2) td');"
        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
        "return [r.x + 5, r.y + 5]; })()"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
    said = "document.querySelector('.heat').closest('.scroll').nextElementSibling.textContent"
    assert tab.run(said).startswith("layers.1.up · ‖ΔW‖ ")


def test_columns_sort_both_ways_and_say_so(tab):
    column = (
        "[...document.querySelectorAll('#budget [data-adapter=\"0\"] tbody tr')]"
        ".map(r => Number(r.cells[4].dataset.value))"
    )
    head = '#budget [data-adapter="0"] th:nth-child(5)'
    before = tab.run(column)
    tab.click(f"{head} button")
    assert tab.run(column) == sorted(before, reverse=True)
    assert tab.run(f"document.querySelector('{head}').ariaSort") == "descending"
    tab.click(f"{head} button")
    assert tab.run(column) == sorted(before)
    assert tab.run(f"document.querySelector('{head}').ariaSort") == "ascending"


def test_text_columns_sort_from_a_to_z(tab):
    tab.click("#overview th:nth-child(1) button")
    names = "[...document.querySelectorAll('#overview tbody tr')].map(r => r.cells[0].textContent)"
    assert tab.run(names) == ["first", "second"]
    tab.click("#overview th:nth-child(1) button")
    assert tab.run(names) == ["second", "first"]


def test_the_tab_key_comes_past_each_heat_map_once(tab):
    tab.run("document.querySelector('.heat').closest('.scroll').focus()")
    tab.press("Tab")
    assert tab.run(f"{FOCUSED}.tagName") == "TD"
    tab.press("Tab")
    assert tab.run(f"{FOCUSED}.tagName") != "TD"


def test_the_accessibility_tree_names_tables_and_pictures(tab):
    tab.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            found.setdefault(node["role"]["value"], []).append(name)
    assert found["heading"][0] == "Adapter report"
    assert "‖ΔW‖ / ‖W‖ of first by layer and module" in found["table"]
    assert all(found["image"] + found["table"] + found["columnheader"])
    assert any(name.startswith("Training loss. first: 1.00 at step 1") for name in found["image"])


def test_a_hostile_name_runs_nothing(browser, tmp_path):
    evil = "<svg onload=alert(1)>\"' onfocus=alert(2) autofocus <script>alert(3)"
    browser.messages.clear()
    browser.open(write_full(tmp_path, evil))
    assert browser.messages == []
    assert browser.run("document.querySelector('#overview tbody th').textContent") == evil
    assert browser.run("document.querySelectorAll('script').length") == 1


def test_a_script_that_were_let_in_would_not_run(tab):
    tab.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'x = 1'}))"
    )
    tab.run("0")
    assert tab.run("typeof x") == "undefined"
    assert any("Content Security Policy" in message for message in tab.messages)
