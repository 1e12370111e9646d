"""Run the command line: a table of commands, imported on use, and the one place where errors are printed."""

import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated

import typer
from typer.exceptions import TyperException

from llamita import __version__
from llamita.commands import console
from llamita.errors import InputError, LlamitaError, RunError

COMMANDS = {  # name: the function that runs it, and its line in `llamita --help`
    "quantize": ("llamita.commands.quantize:command", "Turn a Llama checkpoint into a 4-bit model."),
    "import": (
        "llamita.commands.import_model:command",
        "Convert another tool's model: Meta's own, GGUF, compressed-tensors, GPTQ, torchao.",
    ),
    "finetune": (
        "llamita.commands.finetune:command",
        "Train a model on your data, in float or with 4-bit rounding in every step.",
    ),
    "merge": ("llamita.commands.merge:command", "Merge an adapter into the weights of its model."),
    "export": (
        "llamita.commands.export:command",
        "Write a 4-bit model in the format of another runtime, first of all ExecuTorch for phones.",
    ),
    "evaluate": (
        "llamita.commands.evaluate:command",
        "Measure what quantization cost: perplexity, KL divergence, agreement, LM Eval tasks.",
    ),
    "compare": (
        "llamita.commands.compare:command",
        "Show models side by side: sizes, losses, and where they differ beyond noise.",
    ),
    "generate": ("llamita.commands.generate:command", "Continue a prompt."),
    "chat": ("llamita.commands.chat:command", "Talk to a model in the terminal."),
    "inspect": ("llamita.commands.inspect:command", "Show what a model directory holds."),
    "verify": ("llamita.commands.verify:command", "Check every file of a packed model against its recorded hash."),
    "plan": (
        "llamita.commands.plan:command",
        "Estimate size, memory and speed, before anything is downloaded or made.",
    ),
    "bench": ("llamita.commands.bench:command", "Measure speed, size and memory against the limits of this machine."),
}

_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended: 128 + SIGINT


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the surroundings failed, 2 the input is at fault."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = _make_app(arguments)(args=arguments, prog_name="llamita", standalone_mode=False)
        if code == _INTERRUPTED:  # Typer returns the code of an exit or an interruption and raises neither
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except TyperException as error:
        console.print_error(error.format_message())
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        console.print_error("interrupted")
        sys.exit(_INTERRUPTED)
    except LlamitaError as error:
        if not isinstance(error, InputError) or _speaks():
            console.print_error(str(error))
        sys.exit(error.exit_code)
    except MemoryError:
        console.print_error("memory: this machine has too little for the work asked; try `llamita plan`")
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output went away, as `| head` does
            sys.stderr.close()
            sys.exit(0)
        console.print_error(f"{error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(1)


def _speaks() -> bool:
    """Return whether this process prints what is wrong with the input: under torchrun, one per machine does.

    `system.processes` is not used here, because its native module may be what could not be loaded.
    """
    is_alone = "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return is_alone or os.environ.get("LOCAL_RANK", "0") == "0"


def _make_app(arguments: list[str]) -> typer.Typer:
    """Return the application with every command; import only the one that is asked for."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(_root)
    for name, (entry, summary) in COMMANDS.items():
        function = _load(entry) if name in arguments[:1] else _unused
        app.command(name, short_help=summary)(function)
    return app


def _load(entry: str) -> Callable[..., None]:
    module, function = entry.split(":")
    try:
        return getattr(import_module(module), function)
    except ImportError as error:  # the native module refuses LLAMITA_ISA, or was built for another machine
        if str(error).startswith("LLAMITA_ISA:"):
            raise InputError(str(error)) from None
        raise RunError(f"{module}", f"to load, got: {error}") from None


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
    with --json. Exit codes: 0 done, 1 the surroundings failed, 2 the input is at fault.

    Example: llamita quantize embedded -o my-model && llamita chat my-model
    """


if __name__ == "__main__":
    main()
