"""What holds the tree together: layers, two sides with one border, no unsafe loading, small files."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import typer
from layers import EXTRAS, LAYERS, LEAN, NESTED, ONLY_IN, SIBLINGS, TORCH_PACKAGES, TORCH_SIDE
from places import ROOT
from typer.core import TyperGroup

from llamita import cli

PACKAGE = ROOT / "src" / "llamita"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
FOLDERS = ("src", "tests", "tools", "examples", "benchmarks")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
QUIET = [m for m in MODULES if not m.startswith("commands.") and m not in ("cli", "console")]
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_DOCSTRING = 400, 50, 8  # lines
LAYER = {module: level for level, modules in enumerate(LAYERS) for module in modules}


@lru_cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever in it; relative imports begin with a dot."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, as LAYERS names them."""
    found = set()
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "llamita" and parts[1:]:
            longest = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.update([m for m in longest if m in LAYER][:1])
    return found


def foreign_imports(path: Path) -> set[str]:
    """Packages of others that a file imports, the standard library aside."""
    packages = {name.split(".")[0] for name in imports_of(path)}
    return packages - sys.stdlib_module_names - {"llamita", "__future__"}


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_module_has_its_layer() -> None:
    listed = set(LAYER) - {"_native"}
    assert set(MODULES) - listed == set(), "add new modules to tests/layers.py"
    optional = {m for m in listed if m.startswith("commands.")}  # commands come and go
    assert listed - set(MODULES) <= optional


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    for other in own_imports(MODULES[module]):
        is_sibling = LAYER[other] == LAYER[module] and other in SIBLINGS.get(module, ())
        assert LAYER[other] < LAYER[module] or is_sibling, f"{module} (layer {LAYER[module]}) imports {other}"


def test_siblings_are_no_circle_and_all_used() -> None:
    for module, others in SIBLINGS.items():
        for other in others:
            assert module not in SIBLINGS.get(other, ()), (module, other)
            assert other in own_imports(MODULES[module]), f"{module} no longer imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute_and_at_the_top(module: str) -> None:
    assert not [name for name in imports_of(MODULES[module]) if name.startswith(".")]
    for function in functions_of(MODULES[module]):
        nested = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not nested or f"{module}.{function.name}" in NESTED


@pytest.mark.parametrize("module", MODULES)
def test_packages_of_others_are_imported_where_they_belong(module: str) -> None:
    allowed = {*LEAN, *TORCH_SIDE.get(module, ()), *EXTRAS.get(module, ())}
    for package in foreign_imports(MODULES[module]):
        assert package in allowed, f"{module} imports {package}"
        assert module in ONLY_IN.get(package, (module,)), f"{module} imports {package}"


def test_entries_of_registries_exist() -> None:
    entry = re.compile(r"llamita\.([\w.]+?)(?<!\.json)(?::(\w+))?")
    found = 0
    for path in [PACKAGE / "__init__.py", *MODULES.values()]:
        for node in ast.walk(tree_of(path)):
            value = node.value if isinstance(node, ast.Constant) else None
            match = entry.fullmatch(value) if isinstance(value, str) else None
            if match:
                assert match[1] in MODULES, f"{path.name}: {match[0]}"
                names = {function.name for function in functions_of(MODULES[match[1]])}
                assert match[2] is None or match[2] in names, f"{path.name}: {match[0]}"
                found += 1
    assert found >= len(cli.COMMANDS)


BLOCKED = f"""
import sys
BLOCKED = {TORCH_PACKAGES!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
"""


def run_blocked(program: str, folder: Path) -> str:
    """Run a program in a fresh interpreter that has none of the Torch side's packages; its stdout."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + program], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_lean_modules_import_without_torch(tmp_path: Path) -> None:
    lean = [f"llamita.{module}" for module in MODULES if module not in {*TORCH_SIDE, *EXTRAS}]
    program = f"import importlib\nfor name in {lean!r}: importlib.import_module(name)\n"
    run_blocked(program + "assert not set(BLOCKED) & set(sys.modules)\nprint('done')", tmp_path)


def test_commands_run_without_torch(tmp_path: Path) -> None:
    commands = [
        ["quantize", "embedded", "-o", "small", "--preset", "llama3.2", "--json"],
        ["inspect", "small", "--json"],
        ["verify", "small", "--json"],
        ["plan", "small", "--json"],
        ["bench", "small", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--json"],
        ["generate", "small", "--prompt", "Once", "--max-tokens", "4", "--greedy", "--json"],
        ["evaluate", "small", "--limit", "1", "--max-seq-len", "128", "--json"],
        ["compare", "small", "embedded:arm", "--limit", "1", "--max-seq-len", "64", "--html", "report.html"],
    ]
    program = f"from llamita.cli import main\nfor arguments in {commands!r}: main(arguments)\n"
    run_blocked(program + "assert not set(BLOCKED) & set(sys.modules)", tmp_path)


def test_importing_the_package_is_cheap(tmp_path: Path) -> None:
    heavy = {"numpy", "tokenizers", "huggingface_hub", "llamita.engine.llm"}
    run_blocked(f"import llamita, llamita.cli\nassert not {heavy!r} & set(sys.modules)", tmp_path)


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "compile"}


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keyword_of(call: ast.Call, name: str) -> object:
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_code_from_data(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & UNSAFE_MODULES
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        where = f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        assert name not in UNSAFE_CALLS, where
        if name.endswith("torch.load"):
            assert keyword_of(node, "weights_only") is True, where
        assert keyword_of(node, "allow_pickle") is not True, where
        assert keyword_of(node, "trust_remote_code") is not True, where
        assert keyword_of(node, "shell") is not True, where
        assert name not in ("yaml.load", "os.system"), where


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines < LONGEST_FILE
    if not path.is_relative_to(ROOT / "src"):
        return
    for function in functions_of(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length < LONGEST_FUNCTION, f"{function.name}: {length} lines"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_modules_say_what_they_are_in_a_few_lines(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring
    assert len(docstring.splitlines()) <= LONGEST_DOCSTRING


def test_native_files_are_small() -> None:
    for path in (ROOT / "native").rglob("*.*"):
        assert len(path.read_text("utf-8").splitlines()) < LONGEST_FILE, path.name


@pytest.mark.parametrize("module", QUIET)
def test_only_the_command_line_prints(module: str) -> None:
    for node in ast.walk(tree_of(MODULES[module])):
        if isinstance(node, ast.Call):
            assert called_name(node) not in ("print", "sys.stdout.write", "sys.stderr.write"), f"line {node.lineno}"


def commands_in(text: str) -> Iterator[list[str]]:
    """The `llamita ...` lines of a page's code blocks, as arguments."""
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("llamita ", "$ llamita ", "make ")) else []
            if words:
                yield words[1:] if words[0] == "$" else words


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    """Names and options, as the parsers see them; nothing is run."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    for words in commands_in(page.read_text("utf-8")):
        if words[0] == "make":
            assert words[1] in targets, words
        else:
            group = typer.main.get_command(cli._make_app(words[1:]))
            assert isinstance(group, TyperGroup)
            command = group.get_command(group.make_context("llamita", words[1:]), words[1])
            assert command is not None, words
            command.make_context(words[1], words[2:])


def test_the_readme_shows_the_commands_that_matter() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = {words[1] for words in commands_in(text)}
    assert {"demo", "test", "quantize", "chat", "evaluate"} <= shown
    assert len(text.splitlines()) <= 60  # one screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
