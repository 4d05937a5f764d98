"""Text that every Python installation carries: the standard library's sources and docstrings.

Lines that happen to mention a held-out case of a demo task (say, an identifier that is one)
are left out, so that held-out cases never occur in training by construction.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from multigraft.demo import words
from multigraft.demo.tasks import split_of

# Tests and codec tables are mostly data; the rest of these are not the library itself.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "encodings", "lib2to3", "distutils", "site-packages",
    "dist-packages", "__pycache__",
}  # fmt: skip
LONGEST_LINE = 160
SHORTEST_DOCSTRING = 80

IDENTIFIER = re.compile(r"[A-Za-z]+(?:[_-][A-Za-z]+)*")
IDENTIFIER_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
ISO_DATE = re.compile(r"\b(\d{4})-(\d\d)-(\d\d)\b")
WORD_DATE = re.compile(rf"\b(\d\d?) ({'|'.join(words.MONTHS)}) (\d{{4}})\b")
FULL_NAME = re.compile(r"\b([A-Z][a-z]+) ([A-Z][a-z]+)\b")
KNOWN_WORDS = frozenset(words.IDENTIFIER_WORDS)


def stdlib_files() -> list[Path]:
    """The library's Python sources, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def subjects(line: str) -> Iterator[str]:
    """Everything in a line that could be the subject of a case of a demo task.

    Errs towards too many: any two capitalised words count as somebody's name.
    """
    for found in IDENTIFIER.finditer(line):
        parts = [part.lower() for part in IDENTIFIER_PART.findall(found[0])]
        if 2 <= len(parts) <= 4 and KNOWN_WORDS.issuperset(parts):
            yield "_".join(parts)
    for year, month, day in ISO_DATE.findall(line):
        yield f"{year}-{month}-{day}"
    for day, month, year in WORD_DATE.findall(line):
        yield f"{year}-{words.MONTHS.index(month) + 1:02}-{int(day):02}"
    for first, last in FULL_NAME.findall(line):
        yield f"{first} {last}"


def without_held_out(text: str) -> str:
    """The text less its overlong lines and those that mention a held-out case."""
    kept = (
        line.rstrip()
        for line in text.splitlines()
        if len(line) <= LONGEST_LINE
        and not any(split_of(subject) == "heldout" for subject in subjects(line))
    )
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


def docstrings(tree: ast.AST) -> Iterator[str]:
    """The docstrings of a module, and its long string constants if it is nothing but text."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            found = ast.get_docstring(node)
            if found and len(found) >= SHORTEST_DOCSTRING:
                yield inspect.cleandoc(found)


def topic_texts(tree: ast.AST) -> Iterator[str]:
    """The texts behind `help()`: long string constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 400:
            yield inspect.cleandoc(node.value)


def stdlib_documents() -> Iterator[tuple[str, str, str]]:
    """(name of the file, "source" or "prose", text) of every document, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files():
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files exist to be wrong
            continue
        if name == "pydoc_data/topics.py":
            texts: Iterator[str] = topic_texts(tree)
        else:
            yield name, "source", without_held_out(source)
            texts = docstrings(tree)
        for text in texts:
            yield name, "prose", without_held_out(text)


def python_words(texts: list[str]) -> list[str]:
    """The lower-case words that identifiers in these texts are made of, sorted."""
    found: set[str] = set()
    for text in texts:
        for match in IDENTIFIER.finditer(text):
            found.update(part.lower() for part in IDENTIFIER_PART.findall(match[0]))
    return sorted(word for word in found if 3 <= len(word) <= 10)
