"""The command line: a table of commands, imported on use, and the one place where errors are printed."""

import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, cast

import typer

from llamita import __version__
from llamita.commands import console
from llamita.errors import InputError, LlamitaError, RunError

COMMANDS = {
    "quantize": "llamita.commands.quantize:command",
    "import": "llamita.commands.import_model:command",
    "finetune": "llamita.commands.finetune:command",
    "merge": "llamita.commands.merge:command",
    "export": "llamita.commands.export:command",
    "evaluate": "llamita.commands.evaluate:command",
    "compare": "llamita.commands.compare:command",
    "generate": "llamita.commands.generate:command",
    "chat": "llamita.commands.chat:command",
    "inspect": "llamita.commands.inspect:command",
    "verify": "llamita.commands.verify:command",
    "plan": "llamita.commands.plan:command",
    "bench": "llamita.commands.bench:command",
}
SUMMARIES = {
    "quantize": "Turn a Llama checkpoint into a 4-bit model.",
    "import": "Take over another tool's model: Meta's own, GGUF, compressed-tensors, GPTQ, torchao.",
    "finetune": "Tune a model on your data, in float or with 4-bit rounding in every step.",
    "merge": "Write a model with an adapter in its weights.",
    "export": "Write a 4-bit model in the form of another runtime, ExecuTorch's for phones first.",
    "evaluate": "Measure what quantization cost: perplexity, KL divergence, agreement, LM Eval tasks.",
    "compare": "Show models side by side: sizes, losses, and where they differ beyond noise.",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model in the terminal.",
    "inspect": "Show what a model directory holds.",
    "verify": "Check every file of a model directory against its recorded hash.",
    "plan": "Size, memory and speed to expect, before anything is downloaded or made.",
    "bench": "Measure speed, size and memory, beside the limits of this machine.",
}

# The base of what Typer raises for wrong options: its own class, in older versions Click's.
_BASES = typer.BadParameter.__mro__
_UsageError = cast(type[Exception], _BASES[_BASES.index(Exception) - 1])
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
    except _UsageError as error:
        console.print_error(cast(Any, error).format_message())
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
    """Whether this process tells what is wrong with the input: of torchrun's on a machine, the first.

    Here rather than by `processes`, whose native module may be what could not be loaded.
    """
    is_alone = "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return is_alone or os.environ.get("LOCAL_RANK", "0") == "0"


def _make_app(arguments: list[str]) -> typer.Typer:
    """Every command by name and summary; only the one that is asked for is imported."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(_root)
    for name, entry in COMMANDS.items():
        function = _load(entry) if name in arguments[:1] else _unused
        app.command(name, short_help=SUMMARIES[name])(function)
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
    """Stands for a command in the list of commands."""


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

    An error is one line of text on stderr, with --json, too. Exit codes: 0 done, 1 the surroundings
    failed, 2 the input is at fault.

    Example: llamita quantize embedded -o my-model && llamita chat my-model
    """


if __name__ == "__main__":
    main()
