"""What the verbs draw with, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from multigraft import LoraConfig, get_peft_model
from multigraft.cli import screen
from multigraft.inspection import inspect, outline, render
from multigraft.train import Progress
from tests.subject import Net


def console(*, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=None
    )


def shown(board: Console) -> str:
    return board.file.getvalue()


def progress(step: int, steps: int, seconds: float = 1.0, adapter: str = "a") -> Progress:
    return Progress(adapter, step, steps, 1.5, 1e-3, 0.1, 100 * step, seconds)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert screen.duration(seconds) == text


def test_without_a_terminal_a_run_is_the_first_the_last_and_each_tenth_step():
    board = console()
    with screen.live(board, ["a"]) as on_step:
        for step in range(1, 101):
            on_step(progress(step, 100))
    steps = [line.split("step ")[1].split("/")[0] for line in shown(board).splitlines()]
    assert steps == ["1", *(str(n) for n in range(10, 101, 10))]


def test_without_a_terminal_a_slow_run_says_something_every_half_minute():
    board = console()
    with screen.live(board, ["a"]) as on_step:
        for step in range(1, 9):
            on_step(progress(step, 1000, seconds=12.0 * step))
    steps = [line.split("step ")[1].split("/")[0] for line in shown(board).splitlines()]
    assert steps == ["1", "4", "7"]


def test_a_line_has_the_loss_the_speed_and_the_time_left():
    board = console()
    with screen.live(board, ["a"]) as on_step:
        on_step(progress(1, 4, seconds=2.0))
        on_step(progress(4, 4, seconds=8.0))
    first, last = shown(board).splitlines()
    assert first == "a: step 1/4  loss 1.5000  50 tokens/s  6 s left"
    assert last == "a: step 4/4  loss 1.5000  50 tokens/s"


def test_on_a_terminal_every_adapter_has_a_bar_and_waits_for_its_turn():
    board = console(terminal=True)
    with screen.live(board, ["first", "second"]) as on_step:
        on_step(progress(1, 2, adapter="first"))
        on_step(progress(2, 2, adapter="first"))
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", shown(board))
    # A frame overwrites the one before, so in the text they follow each other without a break.
    drawn = [text.split() for text in re.split(r"(?=first |second )", plain) if "━" in text]
    rows = {words[0]: words for words in drawn}
    assert {"2/2", "1.5000"} <= set(rows["first"])
    assert {"0/?", "waiting"} <= set(rows["second"])


def test_the_tree_that_is_drawn_is_the_outline():
    model = get_peft_model(Net(), LoraConfig(target_modules=["up", "head"]), adapter_name="a[b]")
    structure = inspect(model)
    board = console()
    board.print(screen.tree(structure))
    drawn = [" ".join(line.split()) for line in shown(board).splitlines()]
    assert drawn == [" ".join(line.split()) for line in render(outline(structure)).splitlines()]


def test_a_quiet_screen_shows_nothing(capsys):
    screen.screen(quiet=True).print("anything")
    screen.screen().print("something")
    assert capsys.readouterr().out == "something\n"
