"""The verbs in one application, and errors as one line without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import multigraft
from multigraft.cli.chat import chat
from multigraft.cli.combine import combine
from multigraft.cli.convert import convert
from multigraft.cli.diff import diff
from multigraft.cli.doctor import doctor
from multigraft.cli.evaluate import evaluate
from multigraft.cli.export import export
from multigraft.cli.generate import generate
from multigraft.cli.inspect import inspect
from multigraft.cli.interrupted import EXIT_CODE, Interrupted
from multigraft.cli.listing import list_
from multigraft.cli.merge import merge
from multigraft.cli.plan import plan
from multigraft.cli.preview import preview
from multigraft.cli.quickstart import quickstart
from multigraft.cli.quiet import hush, one_line_warnings
from multigraft.cli.report import report
from multigraft.cli.targets import targets
from multigraft.cli.train import train
from multigraft.cli.verify import verify
from multigraft.errors import MultigraftError

app = typer.Typer(
    name="multigraft",
    help="Many adapters, one frozen base, side by side.",
    epilog="Start with: multigraft quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    hush()
    try:
        with one_line_warnings():
            app(args=list(arguments), prog_name="multigraft")
    except SystemExit as end:
        if end.code == EXIT_CODE:  # typer's answer to Ctrl-C, before there was anything to save
            print("multigraft: interrupted; nothing was saved.", file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except Interrupted as interrupt:
        print(f"multigraft: interrupted; {interrupt}.", file=sys.stderr)
        return EXIT_CODE
    except MultigraftError as error:
        print(f"multigraft: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"multigraft: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"multigraft {multigraft.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Many adapters, one frozen base, side by side."""


app.command()(quickstart)
app.command()(train)
app.command()(plan)
app.command()(preview)
app.command("list")(list_)
app.command()(inspect)
app.command()(verify)
app.command()(targets)
app.command()(diff)
app.command()(report)
app.command()(doctor)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(combine)
app.command()(export)
app.command()(convert)
