"""The command `safediffusion`: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Annotated, TextIO

import typer
from typer.exceptions import TyperException

from safediffusion.cli import bench, compare, demo, direction, evaluate, export, generate, methods, pareto, report, study, terminal, tiny, train
from safediffusion.errors import UserError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Shows tracebacks and every library's warnings, for whoever works on this package.
DEBUG = "SAFEDIFFUSION_DEBUG"

app = typer.Typer(
    name="safediffusion",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = {"demo": demo, "train": train, "generate": generate, "evaluate": evaluate, "compare": compare, "report": report}
_COMMANDS |= {"export": export, "direction": direction, "bench": bench, "methods": methods, "study": study, "pareto": pareto}
for name, room in _COMMANDS.items():
    app.command(name, epilog=room.EXAMPLES)(room.command)
app.add_typer(tiny.app, name="tiny")


def _version(wanted: bool) -> None:
    if wanted:
        from safediffusion import __version__

        typer.echo(f"safediffusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Make a text-to-image diffusion model safe by online reinforcement learning, and prove it.

    [bold]safediffusion demo --out runs/demo[/bold] shows all of it on a small model in a few minutes.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 when interrupted, 1 for a bug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _quiet(), _one_voice(), _terminable():
        try:
            return _run(arguments)
        except UserError as error:
            return _fail(str(error))
        except TyperException as error:
            return _fail(_usage(error))
        except BrokenPipeError:  # the reader of our output has gone, such as `| head`
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (or the interpreter complains at its end)
            return FAILED
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = _sentence(error)
            if sentence is None:
                raise
            return _fail(sentence)


def _run(arguments: list[str]) -> int:
    code = app(arguments, prog_name="safediffusion", standalone_mode=False) or 0
    if code == INTERRUPTED:
        print("\ninterrupted; the same command again goes on where it stopped", file=sys.stderr)
    return code


def _fail(sentence: str) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    where = f" (process {terminal.process()})" if terminal.process() else ""
    print(f"error{where}: {sentence}", file=sys.stderr)
    return USAGE


def _usage(error: TyperException) -> str:
    """What is wrong with the words of the command, and where its help is."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    return f"{message[:1].lower()}{message[1:]}; see {context.command_path if context else 'safediffusion'} --help"


def _sentence(error: Exception) -> str | None:
    """What the machine refused, in a user's words; None for a bug of ours."""
    if isinstance(error, OSError):
        from safediffusion.files import explained

        try:
            with explained(error.filename or "a file"):
                raise error
        except UserError as told:
            return str(told)
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "memory ran out; paint fewer pictures at once (optimizer.batch in a recipe, or --batch-size)"
    if type(error).__name__ == "DistBackendError" or "gloo" in str(error):
        return "another process of this launch has ended; what it said tells why, and the same command goes on from the last checkpoint"
    return None


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes the main one says what came out; errors come from each."""
    with ExitStack() as stack:
        if terminal.process():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, is an interrupt. Not in a launch of several processes: one that waits for another would not hear of it."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our warnings as one line on stderr; the chatter of libraries not at all."""
    if os.environ.get(DEBUG):
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "ACCELERATE_LOG_LEVEL"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"safediffusion(\.|$)")
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None) -> None:
    if not terminal.process():
        print(f"warning: {message}", file=sys.stderr)
