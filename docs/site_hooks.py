"""What the site does with links that leave docs/, and with drawings.

A page of this folder is read in two places: in the repository, where `../examples/lora_xs.py` is a
file beside it, and on the site, where there is nothing but pages. So the files that are linked
to become pages: Markdown keeps its text, others are shown as code.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+?)(#[^)\s]*)?(\))")
DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?images/([\w-]+\.svg)" ?/?>')
HOME = {"README.md": "docs/index.md"}
"""Pages that stand for files which would be a second home page."""
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Files outside docs/ that the navigation names."""
LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash", ".toml": "toml"}


def place(path: str) -> str:
    """Where a file of the repository stands among the site's sources."""
    path = HOME.get(path, path)
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"{path}.md"


def links(text: str, origin: str) -> Iterator[str]:
    """Files of the repository that a page links to, as paths from its root."""
    for _, target, _, _ in LINK.findall(CODE.sub("", text)):
        if "://" not in target and not target.startswith(("#", "mailto:", "/")):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def rewritten(text: str, origin: str) -> str:
    """The page's text with links as they are on the site."""
    here = posixpath.dirname(place(origin))

    def link(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if "://" in target or target.startswith(("mailto:", "/")):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        found = (ROOT / path).is_file() and posixpath.relpath(place(path), here or ".")
        return f"{opening}{found or target}{anchor or ''}{closing}"

    return outside_code(text, lambda part: LINK.sub(link, part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with what is no code in it changed."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts += [change(text[end : match.start()]), match.group()]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def as_page(path: str) -> str:
    """A file of the repository as the text of a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return rewritten(text, path)
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"


def on_files(files: Files, config: Any) -> Files:
    """Bring in what is linked to from pages, and from what is brought in."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    queue, seen = [*ALWAYS, *pages], {*ALWAYS, *pages}
    while queue:
        path = queue.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, place(path), content=as_page(path)))
        if path.endswith(".md"):
            found = set(links((ROOT / path).read_text(encoding="utf-8"), path)) - seen - HOME.keys()
            new = {name for name in found if (ROOT / name).is_file()}
            new = {name for name in new if not name.startswith("docs/")}
            seen |= new
            queue += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/; those of a page that was brought in are done already."""
    is_own = page.file.abs_src_path is not None and page.file.generated_by is None
    return rewritten(markdown, f"docs/{page.file.src_uri}") if is_own else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Drawings as a part of the page: a picture beside it could not follow the page's colours."""

    def drawn(match: re.Match[str]) -> str:
        text = " ".join(html.unescape(match[1]).split())
        svg = (ROOT / "docs" / "images" / match[2]).read_text(encoding="utf-8")
        label = html.escape(text, quote=True)
        return svg.replace(' role="img"', f' role="img" aria-label="{label}"', 1).strip()

    return DRAWING.sub(drawn, content)
