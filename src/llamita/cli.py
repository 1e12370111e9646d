"""The command line: a table of commands, imported on use, and the one place where errors are printed."""

import errno
import sys
from importlib import import_module

import click
import typer
from typer.exceptions import TyperException

from llamita import __version__, console
from llamita.errors import LlamitaError

COMMANDS = {
    "quantize": "llamita.commands.quantize:command",
    "evaluate": "llamita.commands.evaluate:command",
    "generate": "llamita.commands.generate:command",
    "chat": "llamita.commands.chat:command",
    "inspect": "llamita.commands.inspect:command",
    "verify": "llamita.commands.verify:command",
    "plan": "llamita.commands.plan:command",
}
SUMMARIES = {
    "quantize": "Turn a Llama checkpoint into a 4-bit model.",
    "evaluate": "Measure what quantization cost: perplexity, KL divergence, agreement, LM Eval tasks.",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model in the terminal.",
    "inspect": "Show what a model directory holds.",
    "verify": "Check every file of a model directory against its recorded hash.",
    "plan": "Size, memory and speed to expect, before anything is downloaded or made.",
}


def _load(name: str) -> click.Command:
    """The command of this name, its options read from the function's signature by Typer."""
    module, function = COMMANDS[name].split(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(app)


class _Commands(click.Group):
    """Commands by name, each imported when it is asked for: `llamita --help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _load(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the surroundings failed, 2 the input is at fault."""
    group = _Commands(
        name="llamita",
        help="Turn a Llama checkpoint into a 4-bit model that runs at the limit of the hardware.\n\n"
        "Example: llamita quantize embedded -o my-model && llamita chat my-model",
        params=[click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False,
                             callback=_print_version, help="Print the version and exit.")],
        no_args_is_help=True,
    )
    try:
        group.main(args=arguments, prog_name="llamita", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except typer.Exit as error:  # Typer carries a Click of its own, whose exceptions are not Click's
        sys.exit(error.exit_code)
    except (click.ClickException, TyperException) as error:
        console.print_error(error.format_message())
        sys.exit(2)
    except (click.Abort, typer.Abort, KeyboardInterrupt):
        console.print_error("interrupted")
        sys.exit(130)
    except LlamitaError as error:
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


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"llamita {__version__}")
        ctx.exit()


if __name__ == "__main__":
    main()
