"""The command line: the table of commands, and the one place where errors are printed."""

import errno
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, NamedTuple, cast

import typer

from llamita import __version__
from llamita.commands import console, typed
from llamita.errors import InputError, LlamitaError, RunError


class CommandInfo(NamedTuple):
    """A row of the table, so that `llamita --help` imports no command."""

    module: str  # its function `command` runs the command
    summary: str


COMMANDS = {
    "quantize": CommandInfo("llamita.commands.quantize", "Turn a Llama checkpoint into a 4-bit model."),
    "import": CommandInfo(
        "llamita.commands.import_model", "Import a model from GGUF, Meta, compressed-tensors, GPTQ or torchao."
    ),
    "finetune": CommandInfo(
        "llamita.commands.finetune", "Tune a model on your data, in float or with 4-bit rounding in every step."
    ),
    "merge": CommandInfo("llamita.commands.merge", "Merge an adapter into a model's weights."),
    "export": CommandInfo(
        "llamita.commands.export", "Write a 4-bit model for other runtimes: ExecuTorch for phones, GGUF and more."
    ),
    "evaluate": CommandInfo(
        "llamita.commands.evaluate",
        "Measure what quantization costs: perplexity, KL divergence, agreement, LM Eval tasks.",
    ),
    "compare": CommandInfo(
        "llamita.commands.compare", "Compare models: sizes, losses, and where they differ by more than noise."
    ),
    "generate": CommandInfo("llamita.commands.generate", "Continue a prompt."),
    "chat": CommandInfo("llamita.commands.chat", "Talk to a model in the terminal."),
    "serve": CommandInfo("llamita.commands.serve", "Serve models to any OpenAI client, with a page to chat on."),
    "inspect": CommandInfo("llamita.commands.inspect", "Show what a model directory holds."),
    "verify": CommandInfo(
        "llamita.commands.verify", "Check every file of a model directory against its recorded hash."
    ),
    "plan": CommandInfo(
        "llamita.commands.plan", "Estimate size, memory and speed before anything is downloaded or made."
    ),
    "bench": CommandInfo(
        "llamita.commands.bench", "Measure speed, size and memory, compared with the limits of this machine."
    ),
}

# The base of what Typer raises for wrong options: its own class, in older versions Click's.
_BASES = typer.BadParameter.__mro__
_UsageError = cast(type[Exception], _BASES[_BASES.index(Exception) - 1])
_PATIENCE = 10.0  # seconds for another process to come to the same error and print it; then it ends this one
_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended: 128 + SIGINT


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the surroundings failed, 2 the input is at fault, 130 Ctrl-C."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = arguments[0] if arguments[0] in COMMANDS else None
    parameters = []
    try:
        app = typer.main.get_command(_make_app(arguments))
        parameters = cast(Any, app).commands[command].params if command else []
        code = app.main(args=arguments, prog_name="llamita", standalone_mode=False)
        if code == _INTERRUPTED:  # Typer returns the code of an exit or an interruption and raises neither
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except _UsageError as error:
        hint = f"try llamita {command} --help" if command else "try llamita --help"
        console.print_error(str(typed.usage_error(error, arguments, hint)))
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        console.print_error("interrupted")
        sys.exit(_INTERRUPTED)
    except LlamitaError as error:
        if not isinstance(error, InputError) or _prints_input_errors():
            console.print_error(str(typed.at_option(error, parameters, arguments)))
        else:
            time.sleep(_PATIENCE)  # once one process has ended, torchrun ends the others, the one that prints too
        sys.exit(error.exit_code)
    except MemoryError:
        console.print_error("memory: too little on this machine for this work; try `llamita plan`")
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output has closed it, as `| head` does
            sys.stderr.close()
            sys.exit(0)
        console.print_error(f"{error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(1)


def _prints_input_errors() -> bool:
    """Return whether this process prints an error that all processes of a torchrun make: a machine's first one does.

    `system/processes.py` knows this too, but imports the native module, which may be what could not be loaded.
    """
    is_alone = "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return is_alone or os.environ.get("LOCAL_RANK", "0") == "0"


def _make_app(arguments: list[str]) -> typer.Typer:
    """Return the app with every command, of which only the one asked for is imported."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(_root)
    for name, (module, summary) in COMMANDS.items():
        function = _load(module) if name in arguments[:1] else _unused
        app.command(name, short_help=summary)(function)
    return app


def _load(module: str) -> Callable[..., None]:
    try:
        return import_module(module).command
    except ImportError as error:  # the native module refuses LLAMITA_ISA, or was built for another machine
        if str(error).startswith("LLAMITA_ISA:"):
            raise InputError(str(error)) from None
        raise RunError(module, "a module that can be loaded", str(error)) from None


def _unused() -> None:
    """Take the place of a command that is only listed."""


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"llamita {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Turn a Llama checkpoint into a 4-bit model that runs at the limit of the hardware.

    `llamita COMMAND --help` shows the options of a command. An error is one line of text on stderr, also
    with --json. Exit codes: 0 done, 1 the surroundings failed, 2 the input is at fault, 130 stopped by
    Ctrl-C.

    Example: llamita quantize embedded -o my-model && llamita chat my-model
    """


if __name__ == "__main__":
    main()
