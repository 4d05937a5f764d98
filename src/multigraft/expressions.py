"""Whether a regular expression can take for ever, told from the expression alone.

Python's engine tries one way to match after the other. Their number grows exponentially with the
text where a repeated part can match the same text in two ways, as in ``(a+)+`` or ``(a|a)*``; and
as a power of its length where loops follow each other with little between them, as in
``.*.*.*.*``. Configs come from anywhere, so such expressions are refused before they are used.

A repeated part is looked at as an automaton whose states are its single characters: it is ambiguous
if two different walks through it begin and end at one state over the same text (Weber and Seidl
1991, criterion EDA). Two copies of it walk side by side; they part, and meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

try:
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as codes
    import sre_parse as parser

FEW = 10
"""A part that is repeated less often than this is looked at as so many copies."""
STATES, PAIRS = 400, 20_000
"""Larger automata are refused rather than looked at."""
CHAIN = 3
"""Loops in a row; on a path of sixty characters these are some ten thousand ways, and one more
would be half a million."""
APART = 3
"""Characters between two loops that pin down where the one ends."""

_OTHER = 128
"""Stands for every character beyond ASCII."""
_ALL = frozenset(range(_OTHER + 1))
_CATEGORIES = {
    "DIGIT": frozenset([*map(ord, "0123456789"), _OTHER]),
    "SPACE": frozenset([*map(ord, " \t\n\r\f\v"), _OTHER]),
    "WORD": frozenset([c for c in range(128) if chr(c).isalnum() or chr(c) == "_"] + [_OTHER]),
}


@lru_cache(1024)
def slow(pattern: str) -> str | None:
    """Why matching this expression could take for ever, or None."""
    if not re.search(r"[*+{]", pattern):
        return None
    tree = parser.parse(pattern)
    try:
        for body in _loops(tree):
            if _is_ambiguous(body):
                return "a repeated part of it can match the same text in several ways"
    except _TooLargeError:
        return "a repeated part of it is too large"
    if any(_chain(_flat(each)) > CHAIN for each in (tree, *_asides(tree))):
        return f"more than {CHAIN} loops in a row can match the same text, with little in between"
    return None


class _TooLargeError(Exception):
    """More states or pairs than are looked at."""


def _loops(tree: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
    """The outermost parts that are repeated without end, or often."""
    for code, value in tree:
        if code in _REPEATS and _is_loop(value):
            yield value[2]
        else:
            for inner in _inside(code, value):
                yield from _loops(inner)


_REPEATS = tuple(
    getattr(codes, name)
    for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
    if hasattr(codes, name)
)


def _is_loop(repeat: tuple[int, int, Any]) -> bool:
    low, high, _ = repeat
    return high > FEW and high > low


def _inside(code: Any, value: Any) -> list[Any]:
    """The expressions that an item holds."""
    name = str(code)
    if code in _REPEATS:
        return [value[2]]
    if name == "SUBPATTERN":
        return [value[3]]
    if name == "BRANCH":
        return list(value[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    if name == "ATOMIC_GROUP":
        return [value]
    if name == "GROUPREF_EXISTS":
        return [each for each in value[1:] if each is not None]
    return []


_ASIDE = ("ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "AT")


def _asides(tree: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
    """Parts that are matched for themselves: what follows never has them tried again."""
    for code, value in tree:
        for inner in _inside(code, value):
            if str(code) in _ASIDE:
                yield inner
            yield from _asides(inner)


class _Piece(NamedTuple):
    """A loop over some characters, one character, or something of this width."""

    is_loop: bool
    width: int
    chars: frozenset[int] | None


def _flat(tree: Iterable[tuple[Any, Any]]) -> list[_Piece]:
    """What an expression is, piece by piece; of alternatives with loops, those with most."""
    found: list[_Piece] = []
    for code, value in tree:
        name = str(code)
        if name in _ASIDE:
            continue  # one try each, whatever follows
        if code in _REPEATS and _is_loop(value):
            found.append(_Piece(True, 0, _alphabet(value[2])))
        elif code in _REPEATS:
            inner = _flat(value[2])
            copies = min(value[1], FEW) if any(piece.is_loop for piece in inner) else value[0]
            found += inner * copies
        elif inside := _inside(code, value):
            ways = [_flat(inner) for inner in inside]
            loops = [sum(piece.is_loop for piece in way) for way in ways]
            if len(ways) == 1 or any(loops):
                found += ways[loops.index(max(loops))]
            else:
                found.append(_Piece(False, min(sum(p.width for p in way) for way in ways), None))
        elif name in ("GROUPREF", "GROUPREF_IGNORE"):
            found.append(_Piece(True, 0, _ALL))
        else:
            found.append(_Piece(False, 1, _chars(name, value)))
    return found


def _alphabet(tree: Iterable[tuple[Any, Any]]) -> frozenset[int]:
    """Every character that an expression can match."""
    found: frozenset[int] = frozenset()
    for code, value in tree:
        inside = _inside(code, value)
        if inside:
            found = found.union(*map(_alphabet, inside))
        elif str(code) != "AT":
            found |= _chars(str(code), value)
    return found


def _chain(pieces: list[_Piece]) -> int:
    """The most loops in a row of which each could take over what the one before has matched."""
    longest = length = 0
    between: list[_Piece] = []
    before: frozenset[int] = frozenset()
    for piece in pieces:
        if not piece.is_loop:
            between.append(piece)
            continue
        assert piece.chars is not None
        shared = before & piece.chars
        is_apart = sum(each.width for each in between) >= APART
        is_pinned = any(each.chars is not None and not each.chars & shared for each in between)
        length = length + 1 if shared and not (is_apart or is_pinned) else 1
        longest, between, before = max(longest, length), [], piece.chars
    return longest


class _Automaton:
    """A part of an expression by its single characters: which may come first, last, and next."""

    def __init__(self) -> None:
        self.chars: list[frozenset[int]] = []
        self.next: list[Counter[int]] = []

    def state(self, chars: frozenset[int]) -> _Part:
        """A part that is one character of these."""
        if len(self.chars) >= STATES:
            raise _TooLargeError
        self.chars.append(chars)
        self.next.append(Counter())
        own = Counter([len(self.chars) - 1])
        return _Part(own, own, 0)

    def link(self, last: Counter[int], first: Counter[int]) -> None:
        """Let each of ``first`` follow each of ``last``, in as many ways as both have."""
        for state, ways in last.items():
            for target, more in first.items():
                self.next[state][target] += ways * more

    def sequence(self, tree: Iterable[tuple[Any, Any]]) -> _Part:
        """One part behind the other."""
        whole = _Part(Counter(), Counter(), 1)
        for code, value in tree:
            part = self.item(code, value)
            self.link(whole.last, part.first)
            whole = _Part(
                whole.first + _times(part.first, whole.empty),
                part.last + _times(whole.last, part.empty),
                min(whole.empty * part.empty, 2),
            )
        return whole

    def item(self, code: Any, value: Any) -> _Part:
        """One item of an expression."""
        name = str(code)
        if code in _REPEATS:
            return self.repeat(*value)
        if name in ("ASSERT", "ASSERT_NOT", "AT"):
            return _Part(Counter(), Counter(), 1)
        inside = _inside(code, value)
        if inside:
            parts = [self.sequence(inner) for inner in inside]
            return _Part(
                sum((p.first for p in parts), Counter()),
                sum((p.last for p in parts), Counter()),
                min(sum(p.empty for p in parts), 2),
            )
        if name in ("GROUPREF", "GROUPREF_IGNORE"):
            return self.repeat(0, FEW + 1, [(codes.ANY, None)])
        return self.state(_chars(name, value))

    def repeat(self, low: int, high: int, body: Any) -> _Part:
        """A part several times; one that is repeated often leads back to its own beginning."""
        if _is_loop((low, high, body)):
            part = self.sequence(body)
            self.link(part.last, part.first)
            return _Part(part.first, part.last, min(part.empty + (low == 0), 2))
        copies: list[tuple[Any, Any]] = []
        for number in range(min(high, FEW)):
            copies.append((_OPTION if number >= low else _GROUP, body))
        whole = _Part(Counter(), Counter(), 1)
        for kind, tree in copies:
            part = self.sequence(tree)
            self.link(whole.last, part.first)
            empty = min(part.empty + (kind is _OPTION), 2)
            whole = _Part(
                whole.first + _times(part.first, whole.empty),
                part.last + _times(whole.last, empty),
                min(whole.empty * empty, 2),
            )
        return whole


_OPTION, _GROUP = object(), object()


class _Part:
    """States that a part may begin and end with, in how many ways each, and ways to be empty."""

    def __init__(self, first: Counter[int], last: Counter[int], empty: int) -> None:
        self.first, self.last, self.empty = first, last, empty


def _times(states: Counter[int], ways: int) -> Counter[int]:
    return Counter({state: count * ways for state, count in states.items() if ways})


def _is_ambiguous(body: Any) -> bool:
    """Whether the body, repeated, can match the same text in two ways."""
    automaton = _Automaton()
    part = automaton.sequence(body)
    if part.empty and not automaton.chars:
        return False
    automaton.link(part.last, part.first)
    follow, chars = automaton.next, automaton.chars
    if any(ways > 1 for each in follow for ways in each.values()):
        return True
    seen: set[tuple[int, int]] = set()
    front = [(a, b) for each in follow for a in each for b in each if a < b and chars[a] & chars[b]]
    while front:
        pair = front.pop()
        if pair in seen:
            continue
        seen.add(pair)
        if len(seen) > PAIRS:
            raise _TooLargeError
        for a in follow[pair[0]]:
            for b in follow[pair[1]]:
                if a == b:
                    return True
                if chars[a] & chars[b]:
                    front.append((min(a, b), max(a, b)))
    return False


def _chars(name: str, value: Any) -> frozenset[int]:
    """The characters that one item matches; case is not told apart, so there may be more."""
    if name == "LITERAL":
        return _both_cases(value)
    if name == "NOT_LITERAL":
        return _ALL - {value} | {_OTHER}
    if name == "IN":
        return _set(value)
    return _ALL


def _set(items: Iterable[tuple[Any, Any]]) -> frozenset[int]:
    found: frozenset[int] = frozenset()
    is_negated = False
    for code, value in items:
        name = str(code)
        if name == "NEGATE":
            is_negated = True
        elif name == "LITERAL":
            found |= frozenset([value]) if is_negated else _both_cases(value)
        elif name == "RANGE":
            low, high = value
            found |= frozenset(min(c, _OTHER) for c in range(low, min(high, _OTHER) + 1))
            found |= frozenset([_OTHER]) if high >= _OTHER else frozenset()
        elif name == "CATEGORY":
            found |= _category(str(value))
    return (_ALL - found) | {_OTHER} if is_negated else found


def _category(name: str) -> frozenset[int]:
    kind = name.removeprefix("CATEGORY_")
    chars = _CATEGORIES.get(kind.removeprefix("NOT_"), _ALL)
    return (_ALL - chars) | {_OTHER} if kind.startswith("NOT_") else chars


def _both_cases(code: int) -> frozenset[int]:
    text = chr(code)
    return frozenset(min(ord(c), _OTHER) for each in (text.lower(), text.upper()) for c in each)
