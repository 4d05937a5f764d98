"""Assertions of the shared suite explain themselves like those of test files."""

import pytest

pytest.register_assert_rewrite("tests.methods.against_peft")
