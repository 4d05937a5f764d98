"""Tiny bases of several architectures, each made once a session."""

from __future__ import annotations

import pytest

from tests.train.tasks.bases import WRITERS, Setting


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = WRITERS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def set_up(folders):
    return lambda subject, **options: Setting(subject, folders(subject.base), **options)
