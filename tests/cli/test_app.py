"""The command itself: help, version, and what it says when it cannot begin."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import multigraft
from multigraft import cli


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return end.value.code


def test_without_a_verb_it_lists_the_verbs(capsys):
    run()
    shown = "".join(capsys.readouterr())
    assert "quickstart" in shown
    assert "train" in shown


def test_it_says_its_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"multigraft {multigraft.__version__}\n"


def test_a_missing_extra_is_named_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    assert run("quickstart") == 2
    assert capsys.readouterr().err == (
        "multigraft: the command line needs rich: pip install 'multigraft[train]'\n"
    )


def test_ctrl_c_while_it_starts_is_one_line(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("multigraft.cli.app.hush", interrupted)
    assert run("quickstart") == 130
    assert capsys.readouterr().err == "multigraft: interrupted; nothing was saved.\n"


def test_a_file_system_that_refuses_is_one_line(capsys, monkeypatch):
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("multigraft.train.job.Job.prepare", lambda job, ranks: refused())
    assert run("train", "--model", "m", "--data", "d", "--output", "o") == 2
    assert capsys.readouterr().err == "multigraft: some/file: Permission denied\n"


def test_other_libraries_chatter_is_kept_off_the_screen_unless_asked_for(monkeypatch):
    from multigraft.cli.quiet import hush

    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setenv("MULTIGRAFT_VERBOSE", "1")
    hush()
    assert logger.level == logging.WARNING
    monkeypatch.delenv("MULTIGRAFT_VERBOSE")
    hush()
    assert logger.level == logging.ERROR


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "multigraft", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"multigraft {multigraft.__version__}\n"
