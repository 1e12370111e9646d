"""The one rule of the source tree: a module imports from its own room and from rooms below it, without circles.

Strings such as "llamita.module:function", which registries import on use, count like import statements.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from places import ROOT
from source_tree import (
    MODULES,
    PACKAGE,
    TORCH_PACKAGES,
    foreign_packages,
    own_imports,
    room_of,
    torch_side,
    tree_of,
    uses,
)

from llamita.cli import COMMANDS

ROOMS = (  # from the top down
    "__main__",
    "cli",
    "commands",
    "serve",
    "train",
    "export",
    "evaluate",
    "bench",
    "loading",
    "quantize",
    "methods",
    "imports",
    "engine",
    "text",
    "models",
    "formats",
    "system",
    "numerics",
    "errors",
)
LEVEL = {room: -place for place, room in enumerate(ROOMS)}
MOST_ROOT_FILES = 6

LEAN_ROOMS = ("numerics", "system", "formats", "models", "text", "engine", "bench", "commands")
LOADED_BY_STRING = {"system.torch_processes", "text.hub_datasets"}  # the Torch side of a lean room
SERVE_PACKAGES = {"starlette", "uvicorn", "prometheus_client", "llguidance"}  # for the room `serve` alone
LEAN_PACKAGES = {
    "numpy",
    "tokenizers",
    "jinja2",
    "markupsafe",
    "typer",
    "rich",
    "huggingface_hub",
    "yaml",
    "matplotlib",
}
ONLY_IN = {
    "tokenizers": {"text.tokenizer", "imports.tokenizers"},
    "jinja2": {"text.template_process", "evaluate.charts"},
    "markupsafe": {"evaluate.charts"},
    "huggingface_hub": {"imports.hub"},
    "rich": {"commands.console"},
    "yaml": {"train.recipe"},
    "matplotlib": {"bench.roofline"},
}


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    assert len(list(PACKAGE.glob("*.py*"))) <= MOST_ROOT_FILES  # the stub of the native module counts


def test_imports_point_downward() -> None:
    upward = [(m, other) for m in MODULES for other in uses(m) if LEVEL[room_of(other)] > LEVEL[room_of(m)]]
    assert not upward


def test_no_circle() -> None:
    try:
        TopologicalSorter({module: uses(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {error.args[1]}")


def test_only_the_command_line_can_print() -> None:
    outside = [m for m in MODULES if room_of(m) not in ("cli", "commands", "__main__")]
    assert not [m for m in outside if "commands.console" in own_imports(MODULES[m])]
    assert not [m for m in outside if "rich" in foreign_packages(MODULES[m])]
    writing = {"print", "sys.stdout.write", "sys.stderr.write"}
    assert not [(m, name) for m in outside for name in called_names(m) if name in writing]


def test_commands_do_not_import_commands() -> None:
    modules = {entry.split(":")[0].removeprefix("llamita.") for entry, _ in COMMANDS.values()}
    assert not {module: found for module in modules if (found := uses(module) & modules)}


def called_names(module: str) -> list[str]:
    """Return the function of every call of a module, as it is written."""
    return [ast.unparse(node.func) for node in ast.walk(tree_of(MODULES[module])) if isinstance(node, ast.Call)]


def test_lean_rooms_do_not_reach_torch() -> None:
    assert not {m for m in torch_side() if room_of(m) in LEAN_ROOMS} - LOADED_BY_STRING


def test_packages_of_others_are_imported_where_they_belong() -> None:
    found = {(m, package) for m, path in MODULES.items() for package in foreign_packages(path)}
    known = LEAN_PACKAGES | TORCH_PACKAGES | SERVE_PACKAGES
    assert not {(m, package) for m, package in found if package not in known}
    assert not {(m, package) for m, package in found if package in SERVE_PACKAGES and room_of(m) != "serve"}
    assert not {(m, package) for m, package in found if m not in ONLY_IN.get(package, {m})}


def test_every_room_has_tests() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("[!_]*.py"))}
    assert rooms <= folders
    assert folders - rooms <= {"native", "project", "gallery", "clients"}
