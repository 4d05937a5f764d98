"""The two look-up tables: by name, and by an object's own type."""

from __future__ import annotations

import gc
import weakref

import pytest

from multigraft.errors import UnsupportedError
from multigraft.registry import Registry, TypeRegistry, qualified_name


class Root:
    """Registered in most tests."""


class Child(Root):
    """A subclass."""


class Grandchild(Child):
    """A subclass of a subclass."""


def test_a_name_means_what_was_registered_under_it() -> None:
    registry: Registry[int] = Registry("number")
    assert registry.register("one", 1) == 1
    assert registry["one"] == 1
    assert "one" in registry


def test_a_name_that_is_taken_is_our_own_mistake() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one", 1)
    with pytest.raises(ValueError, match="number `one` is registered already"):
        registry.register("one", 2)
    assert registry["one"] == 1


def test_an_unknown_name_is_refused_with_the_nearest_and_all_there_are() -> None:
    registry: Registry[int] = Registry("number")
    for name in ("two", "three"):
        registry.register(name, 0)
    expected = r"number `tree` is unknown\. Nearest: `three`\. Known: `three`, `two`\."
    with pytest.raises(UnsupportedError, match=expected):
        registry["tree"]


def test_names_come_in_the_order_of_registration() -> None:
    registry: Registry[int] = Registry("number")
    for value, name in enumerate("cab"):
        registry.register(name, value)
    assert list(registry) == ["c", "a", "b"]
    assert registry.items() == [("c", 0), ("a", 1), ("b", 2)]


def test_a_forgotten_name_is_free_and_forgetting_twice_is_nothing() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one", 1)
    for _ in range(2):
        registry.unregister("one")
    registry.register("one", 2)
    assert registry["one"] == 2


def test_the_nearest_registered_base_class_serves_a_type() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(Root)("root")
    assert registry.find(Grandchild) == "root"
    registry.register(Child)("child")
    assert [registry.find(cls) for cls in (Root, Child, Grandchild)] == ["root", "child", "child"]


def test_a_type_of_no_registered_kind_is_served_by_nothing() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(Child)("child")
    assert registry.find(Root) is None


def test_a_type_may_be_given_by_name_and_is_never_imported() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(qualified_name(Root), "no_such_library.Layer")("both")
    assert registry.find(Child) == "both"


def test_only_the_type_itself_counts_as_registered() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(Root)("root")
    assert Root in registry
    assert Child not in registry


def test_a_type_that_is_taken_is_our_own_mistake_by_object_or_by_name() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(Root)("root")
    with pytest.raises(ValueError, match=r"thing for `.*Root` is registered already"):
        registry.register(qualified_name(Root))("other")


def test_a_forgotten_type_is_served_by_its_base_class_again() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    registry.register(Root)("root")
    registry.register(Child)("child")
    assert registry.find(Grandchild) == "child"
    registry.unregister(Child)
    assert registry.find(Grandchild) == "root"


def test_types_that_were_looked_up_are_not_kept_alive() -> None:
    registry: TypeRegistry[str] = TypeRegistry("thing")
    passing = type("Passing", (Root,), {})
    registry.find(passing)
    seen = weakref.ref(passing)
    del passing
    gc.collect()
    assert seen() is None
