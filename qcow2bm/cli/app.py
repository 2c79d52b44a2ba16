"""The command line as a Typer application.

A command is a row of COMMANDS and a function in a module of its own. Only the one that is called is imported and
built: building all of them would cost every start more than `list` takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperOption
from typer.main import get_command

from ..errors import NotQcow2Error, UsageError
from .terminal import printable

app: typer.Typer
"""All commands, built when it is asked for (PEP 562): for the generated documentation and for tests."""

PROGRAM = "qcow2bm"
_FORMAT = "qcow2"
_COMPLETION = "_QCOW2BM_COMPLETE"
_SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""Environment variables by which a caller says how large the terminal is."""
_WIDEST = 500

_LOOK, _CHANGE, _COMBINE, _SAFETY = "Look", "Change", "Combine", "Safety"


class _Command(TyperCommand):
    """What all commands have: a usage line with `IMAGE`, where Typer would write `{IMAGE}`, and `-f qcow2`."""

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - handed on as they are
        super().__init__(*args, **settings)
        own = {word for param in self.params for word in param.opts}
        if "--format-a" in own:
            return  # it takes two images, of any format it knows, and says which is which
        self.params.append(
            TyperOption(
                # `export` and `import` have a --format of another file; -f is the image's everywhere.
                param_decls=["-f"] if "--format" in own else ["-f", "--format"],
                metavar="FORMAT",
                help="The image's format: qcow2, and nothing else is ever guessed.",
                callback=_only_qcow2,
                expose_value=False,
            )
        )

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401 - a class that Typer does not export
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


def _only_qcow2(_: object, __: object, value: str | None) -> None:
    if value not in (None, _FORMAT):
        raise NotQcow2Error(f"format '{value}' is none that qcow2bm handles", hint="it reads and writes qcow2")


class Command(NamedTuple):
    """Where a command's function is, and the section of the help it belongs to.

    `takes_minus`: a word that begins with a minus and is no option is an argument, as in `resize IMAGE -1G`.
    """

    module: str
    function: str
    section: str
    takes_minus: bool = False


COMMANDS = {
    "info": Command("info", "info", _LOOK),
    "list": Command("list", "list_bitmaps", _LOOK),
    "show": Command("show", "show", _LOOK),
    "dump": Command("dump", "dump", _LOOK),
    "check": Command("check", "check", _SAFETY),
    "repair": Command("repair", "repair", _SAFETY),
    "explain": Command("explain", "explain", _SAFETY),
    "why": Command("why", "why", _SAFETY),
    "add": Command("add", "add", _CHANGE),
    "remove": Command("remove", "remove", _CHANGE),
    "rename": Command("rename", "rename", _CHANGE),
    "clear": Command("clear", "clear", _CHANGE),
    "enable": Command("recording", "enable", _CHANGE),
    "disable": Command("recording", "disable", _CHANGE),
    "set": Command("ranges", "set_ranges", _CHANGE),
    "unset": Command("ranges", "unset_ranges", _CHANGE),
    "invert": Command("invert", "invert", _CHANGE),
    "resample": Command("resample", "resample", _CHANGE),
    "resize": Command("resize", "resize", _CHANGE, takes_minus=True),
    "merge": Command("merge", "merge", _COMBINE),
    "copy": Command("copy", "copy", _COMBINE),
    "diff": Command("diff", "diff", _COMBINE),
    "rebuild": Command("rebuild", "rebuild", _COMBINE),
    "prove": Command("prove", "prove", _COMBINE),
    "estimate": Command("estimate", "estimate", _LOOK),
    "export": Command("export", "export", _COMBINE),
    "import": Command("import_", "import_bitmaps", _COMBINE),
    "undo": Command("undo", "undo", _SAFETY),
}

_UsageError: Any = typer.BadParameter.__base__
"""Typer's class of all usage errors, which it does not export."""


def application(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with these commands."""
    built = typer.Typer(
        name=PROGRAM,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(_program)
    for name in names:
        command = COMMANDS[name]
        function = getattr(import_module(f".{command.module}", __package__), command.function)
        settings = {"ignore_unknown_options": True} if command.takes_minus else None
        built.command(name, cls=_Command, context_settings=settings, rich_help_panel=command.section)(function)
    if set(names) == set(COMMANDS):
        built.command("qemu-img", rich_help_panel=_SAFETY, add_help_option=False)(_qemu_img)
    return built


def __getattr__(name: str) -> object:
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(words: list[str]) -> int:
    """Run one command line; returns the exit status.

    Raises:
        Qcow2bmError, OSError: the command failed.
    """
    _cap_width()
    completing = _COMPLETION in os.environ
    called = next((word for word in words if not word.startswith("-")), None)
    only = [called] if called in COMMANDS and called == words[0] and not completing else COMMANDS
    command = get_command(application(only))
    if completing:
        return int(command.main(words, prog_name=PROGRAM, standalone_mode=False) or 0)
    try:
        with command.make_context(PROGRAM, list(words)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 1
    except _UsageError as error:
        return _explain_usage(error)


def _cap_width() -> None:
    """Let nobody ask for lines of a million columns: the help would be drawn that wide."""
    for name in _SIZES:
        asked = os.environ.get(name)
        if asked is None:
            continue
        if not (asked.isascii() and asked.isdecimal() and asked.strip("0")):
            del os.environ[name]
        elif len(asked.lstrip("0")) > len(str(_WIDEST)) or int(asked) > _WIDEST:
            os.environ[name] = str(_WIDEST)


def _explain_usage(error: Any) -> int:  # noqa: ANN401 - a class that Typer does not export
    """A usage error in the form of all others, below the usage of the command it is about."""
    context = error.ctx
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return UsageError.exit_status
    what = error.format_message().strip().rstrip(".")
    help_line = f"`{context.command_path if context is not None else PROGRAM} --help` explains"
    if context is not None:
        typer.echo(context.get_usage(), err=True)
    typer.echo(f"qcow2bm: {printable(what[:1].lower() + what[1:])}; {help_line}", err=True)
    return UsageError.exit_status


def _program(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", show_default=False)] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.", show_default=False)
    ] = False,
) -> None:
    """Persistent dirty bitmaps in qcow2 images whose VM is off: look at them, change them, combine them.

    A change is planned first, proved against the image, and committed all at once; a crash leaves the old state or
    the new one. `--dry-run` prints the plan.

    Exit status: 0 done; 1 failed; 2 the image is corrupt; 3 leaked clusters only; 4 a bitmap is inconsistent or
    broken; 63 not a qcow2 image; 64 usage; 75 the image is in use, try later.
    """
    del debug  # taken out before Typer sees the line, see __main__
    if version:
        from .. import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _qemu_img() -> None:
    """The drop-in: `bitmap` and `check` with qemu-img's own switches, output and status; the rest is the real one."""
    raise AssertionError("dispatched in __main__, before Typer is loaded")
