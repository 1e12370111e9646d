"""What every file keeps: absolute imports, small size, no code loaded from data, a lean side without Torch."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from places import ROOT
from source_tree import MODULES, PACKAGE, TORCH_PACKAGES, entries_of, imports_of, torch_side, tree_of

from llamita import cli

FOLDERS = ("src", "tests", "tools", "examples", "benchmarks")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_DOCSTRING = 400, 50, 8  # lines

# Imports inside functions, each with its reason.
BACKEND = "a backend's packages and SDK are there or not, whatever the others are"
RUNTIME = "the process that runs a program has the runtime, not the one that asks for it"
NESTED = {
    "export.partitioners._xnnpack": BACKEND,
    "export.partitioners._vulkan": BACKEND,
    "export.partitioners._coreml": BACKEND,
    "export.partitioners._qnn": BACKEND,
    "export.partitioners._mediatek": BACKEND,
    "export.runtime._load": RUNTIME,
}


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_are_absolute_and_at_the_top() -> None:
    assert not [(m, name) for m, path in MODULES.items() for name in imports_of(path) if name.startswith(".")]
    nested = {
        f"{module}.{function.name}"
        for module, path in MODULES.items()
        for function in functions_of(path)
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(function))
    }
    assert nested == set(NESTED)


def test_entries_of_registries_exist() -> None:
    found = 0
    for path in [PACKAGE / "__init__.py", *MODULES.values()]:
        for module, name in entries_of(path):
            assert module in MODULES, f"{path.name}: {module}"
            assert name in {None, *(function.name for function in functions_of(MODULES[module]))}, f"{module}:{name}"
            found += 1
    assert found >= len(cli.COMMANDS)


BLOCKED = f"""
import sys
BLOCKED = {sorted(TORCH_PACKAGES)!r}
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
    has_matplotlib = {"bench.roofline"}  # lean, but with a package that only an extra installs
    lean = [f"llamita.{module}" for module in sorted(set(MODULES) - torch_side() - has_matplotlib)]
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
    # On a busy machine a probe of `bench` can be too weak, which is exit code 1 behind all figures.
    program = f"""
from llamita.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as error:
        assert (error.code, arguments[0]) == (1, "bench")
"""
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


def faults_of(path: Path) -> Iterator[str]:
    """Yield what a file does to load code from data, or to run a shell."""
    if {name.split(".")[0] for name in imports_of(path)} & UNSAFE_MODULES:
        yield f"{path.relative_to(ROOT)}: imports of {sorted(UNSAFE_MODULES)}"
    for call in ast.walk(tree_of(path)):
        if not isinstance(call, ast.Call):
            continue
        name = called_name(call)
        unsafe = name in UNSAFE_CALLS or name in ("yaml.load", "os.system")
        unsafe |= name.endswith("torch.load") and keyword_of(call, "weights_only") is not True
        unsafe |= any(keyword_of(call, key) is True for key in ("allow_pickle", "trust_remote_code", "shell"))
        if unsafe:
            yield f"{path.relative_to(ROOT)}:{call.lineno}: {name}"


def test_nothing_loads_code_from_data() -> None:
    assert not [fault for path in SCRIPTS for fault in faults_of(path)]


def test_files_and_functions_are_small() -> None:
    files = [*SCRIPTS, *(ROOT / "native").rglob("*.*")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines >= LONGEST_FILE}
    assert not [
        (path.stem, function.name)
        for path in MODULES.values()
        for function in functions_of(path)
        if (function.end_lineno or 0) - function.lineno + 1 >= LONGEST_FUNCTION
    ]


def test_modules_say_what_they_are_in_a_few_lines() -> None:
    docstrings = {module: ast.get_docstring(tree_of(path)) or "" for module, path in MODULES.items()}
    assert not [m for m, text in docstrings.items() if not 0 < len(text.splitlines()) <= LONGEST_DOCSTRING]
