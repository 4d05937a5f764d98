"""The documentation's site: it builds without a warning, and what it says leads somewhere.

Skipped where mkdocs is not installed (extra `docs`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import typer.main
import yaml

import multigraft
from multigraft.cli.app import app
from tests.docs import page

pytestmark = pytest.mark.slow

ROOT = page.DOCS.parent
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


def mkdocs(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments],
        cwd=cwd,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass
class Read(HTMLParser):
    """What a page of the site holds.

    Args:
        ids: anchors.
        links: addresses of everything that it leads to or fetches.
        fetched: those of the latter kind.
        headings: levels, in order, of the text itself.
        unnamed: pictures without words for those who cannot see them.
    """

    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    fetched: set[str] = field(default_factory=set)
    headings: list[int] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found and tag != "meta"}
        addresses = {found[name] for name in ("href", "src") if name in found}
        self.links |= addresses
        if tag in ("script", "img", "link", "iframe") and found.get("rel") != "canonical":
            self.fetched |= addresses
        if tag == "article" or self.depth:
            self.depth += tag not in VOID
            if re.fullmatch("h[1-6]", tag):
                self.headings.append(int(tag[1]))
            is_drawing = tag == "svg" and "drawing" in found.get("class", "")
            words = found.get("aria-label" if is_drawing else "alt", "")
            if (is_drawing or tag == "img") and len(words) < 10:
                self.unnamed.append(str(found))

    def handle_endtag(self, tag: str) -> None:
        if self.depth and tag not in VOID:
            self.depth -= 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs("--site-dir", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Read]:
    """Every page of the site by its path."""
    found = {}
    for path in site.rglob("*.html"):
        read = Read()
        read.feed(path.read_text(encoding="utf-8"))
        found[path.relative_to(site).as_posix()] = read
    return found


def test_every_page_of_docs_is_on_the_site(pages: dict[str, Read]) -> None:
    sources = {path.relative_to(page.DOCS) for path in page.DOCS.rglob("*.md")}
    assert {path.with_suffix(".html").as_posix() for path in sources} <= pages.keys()
    assert {"CHANGELOG.html", "CONTRIBUTING.html", "examples/lora_xs.py.html"} <= pages.keys()


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Read]) -> None:
    dead = []
    for name, read in pages.items():
        for link in read.links if name != "404.html" else ():
            address, anchor = urldefrag(link)
            if "://" in address or address.startswith(("mailto:", "data:", "javascript:")):
                continue
            target = (site / name).parent / unquote(address) if address else site / name
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target.resolve().relative_to(site.resolve()).as_posix())
            if not target.exists() or (anchor and known and unquote(anchor) not in known.ids):
                dead.append(f"{name}: {link}")
    assert dead == []


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[str, Read]) -> None:
    assert {link for read in pages.values() for link in read.fetched if "//" in link} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*", styles) == []


def test_headings_go_down_one_step_at_a_time(pages: dict[str, Read]) -> None:
    for name, read in pages.items():
        if name == "404.html":
            continue
        assert read.headings and read.headings[0] == 1, name
        assert read.headings.count(1) == 1, name
        steps = zip(read.headings, read.headings[1:], strict=False)
        assert [step for step in steps if step[1] > step[0] + 1] == [], name


def test_pictures_have_words(pages: dict[str, Read]) -> None:
    assert [(name, read.unnamed) for name, read in pages.items() if read.unnamed] == []


def test_every_public_name_has_its_place_in_the_api(pages: dict[str, Read]) -> None:
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (page.DOCS / "api").glob("*.md"))
    named = re.findall(r"^::: multigraft\.(\w+)$", sources, re.MULTILINE)
    assert len(named) == len(set(named))
    tree = vars(multigraft.errors).items()  # shown whole
    errors = {name for name, kind in tree if getattr(kind, "__name__", "") == name}
    expected = set(multigraft.__all__) - {"__version__"} - errors | {"errors"}
    assert sorted(named) == sorted(expected)


def test_every_public_name_is_described(site: Path) -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    silent = [
        name
        for name in multigraft.__all__
        if re.search(rf'id="multigraft\.[\w.]*\b{name}"', text) is None and name != "__version__"
    ]
    assert silent == []


def test_every_verb_is_listed_with_its_options(site: Path) -> None:
    text = (site / "command-line.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h2 id="([\w-]+)">(.*?)(?=<h2|</article>)', text, re.DOTALL))
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        options = [name for p in shown for name in p.opts if name.startswith("-")]
        assert [o for o in options if f"<code>{o}</code>" not in sections[verb]] == [], verb
        assert options, verb


# What makes a build fail.


def wrong(folder: Path, text: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A site of these pages, built under our own rules."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": "docs", "nav": ["index.md"], "plugins": [], "hooks": []}
    config["theme"] = {"name": "material", "font": False}
    (folder / "docs").mkdir()
    (folder / "docs" / "site.css").touch()
    for name, content in {"index": text, **more}.items():
        (folder / "docs" / f"{name}.md").write_text(content)
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config))
    return mkdocs(cwd=folder)


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("# A\n\n[b](nowhere.md)", {}, "'nowhere.md'"),
        ("# A\n\n[b](#nowhere)", {}, "'#nowhere', but there is no such anchor"),
        ("# A", {"left": "# Left out"}, "left.md"),
    ],
    ids=["a dead link", "a dead anchor", "a page that the navigation leaves out"],
)
def test_a_fault_fails_the_build(
    tmp_path: Path, text: str, more: dict[str, str], said: str
) -> None:
    done = wrong(tmp_path, text, **more)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_sound_page_is_built_under_the_same_rules(tmp_path: Path) -> None:
    assert wrong(tmp_path, "# A\n\n[a](#a)").returncode == 0


# The Python of every page is run by some test.


def runners() -> Iterator[tuple[Path, str]]:
    """Test files that run code, and scripts that print a page from what its code gives."""
    for path in [*(ROOT / "tests").rglob("*.py"), *page.DOCS.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if "exec(" in text or "page.run(" in text or 'run("' in text:
            yield path, text


def test_the_python_of_every_page_is_run() -> None:
    known = list(runners())
    for source in page.pages():
        if page.python(source.name):
            printed = page.DOCS / f"{source.stem}.py"
            named = [path for path, text in known if f'"{source.name}"' in text or path == printed]
            assert named, f"no test runs the Python of docs/{source.name}"
