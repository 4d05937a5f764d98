"""Two look-up tables that serve every kind of thing that can be registered.

`Registry` goes by name (methods, initialisations). `TypeRegistry` goes by an object's own type,
along its MRO; a third-party type is given as a qualified name, so that nothing is imported to ask:
an object of a library that is not imported cannot exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from multigraft.errors import UnsupportedError, did_you_mean

T = TypeVar("T")


def qualified_name(cls: type) -> str:
    """``module.ClassName`` of a class, the form under which third-party types are registered."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Registry(Generic[T]):
    """Names to things. Registering a name twice is our own mistake and fails at import."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item``; raises ``ValueError`` when the name is taken."""
        if name in self._items:
            raise ValueError(f"{self.what} `{name}` is registered already")
        self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Forget ``name``; unknown names are ignored."""
        self._items.pop(name, None)

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            known = ", ".join(f"`{n}`" for n in sorted(self._items))
            hint = did_you_mean(name, self._items)
            message = f"{self.what} `{name}` is unknown.{hint} Known: {known}."
            raise UnsupportedError(message) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> list[tuple[str, T]]:
        """All pairs, in order of registration."""
        return list(self._items.items())


class TypeRegistry(Generic[T]):
    """Types (or their qualified names) to things, looked up along the MRO of an object's type."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}
        # Looked up for every module of a model; weak, since parametrised layers have own classes.
        self._found: WeakKeyDictionary[type, T | None] = WeakKeyDictionary()

    def register(self, *types: type | str) -> Callable[[T], T]:
        """Decorator: the decorated thing serves these types and their subclasses."""

        def add(item: T) -> T:
            for cls in types:
                name = cls if isinstance(cls, str) else qualified_name(cls)
                if name in self._items:
                    raise ValueError(f"{self.what} for `{name}` is registered already")
                self._items[name] = item
            self._found.clear()
            return item

        return add

    def unregister(self, *types: type | str) -> None:
        """Forget these types; unknown ones are ignored."""
        for cls in types:
            self._items.pop(cls if isinstance(cls, str) else qualified_name(cls), None)
        self._found.clear()

    def find(self, cls: type) -> T | None:
        """What serves ``cls`` or its nearest registered base class, or ``None``."""
        try:
            return self._found[cls]
        except KeyError:
            names = (qualified_name(base) for base in cls.__mro__)
            found = next((self._items[name] for name in names if name in self._items), None)
            self._found[cls] = found
            return found

    def __contains__(self, cls: object) -> bool:
        """Whether ``cls`` itself is registered, and not only one of its base classes."""
        return isinstance(cls, type) and qualified_name(cls) in self._items

    def items(self) -> list[tuple[str, T]]:
        """All pairs, in order of registration."""
        return list(self._items.items())
