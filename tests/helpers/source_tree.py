"""The package's own source as data: modules, what each imports, by statement or by a "module:function" string."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "src" / "llamita"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
# Packages that only optional installs bring. Modules that reach one by top-level imports are the Torch side.
TORCH_PACKAGES = {"torch", "torchao", "transformers", "lm_eval", "datasets", "accelerate", "peft", "trl", "executorch"}
TORCH_PACKAGES |= {"coremltools", "compressed_tensors", "safetensors", "evaluate", "sacrebleu", "rouge_score"}
_ENTRY = re.compile(r"llamita\.([\w.]+?)(?::(\w+))?")


@cache
def tree_of(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(path: Path, top_level: bool = False) -> Iterator[str]:
    """Yield the full names of all that a file imports, in functions too; relative imports begin with a dot."""
    tree = tree_of(path)
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def entries_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield module and function of every string "llamita.module" or "llamita.module:function"."""
    for node in ast.walk(tree_of(path)):
        value = node.value if isinstance(node, ast.Constant) else None
        match = _ENTRY.fullmatch(value) if isinstance(value, str) else None
        if match and match[1] != "json":  # the file llamita.json
            yield match[1], match[2]


@cache
def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports by statement."""
    found = set()
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "llamita":
            longest = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.update([module for module in longest if module in MODULES][:1])
    return found


@cache
def uses(module: str) -> set[str]:
    """Return the modules that a module imports, by statement or by string."""
    path = MODULES[module]
    strings = {entry for entry, _ in entries_of(path) if entry in MODULES}
    return (own_imports(path) | strings) - {module}


def foreign_packages(path: Path) -> set[str]:
    """Return the packages of others that a file imports, the standard library aside."""
    packages = {name.split(".")[0] for name in imports_of(path)}
    return packages - sys.stdlib_module_names - {"llamita", "__future__"}


def room_of(module: str) -> str:
    """Return the first part of a module's name: its folder, or itself at the package root."""
    return module.split(".")[0]


@cache
def torch_side() -> set[str]:
    """Return the modules that reach a package of the Torch side by top-level imports."""
    reaching = {m for m, path in MODULES.items() if {n.split(".")[0] for n in imports_of(path, True)} & TORCH_PACKAGES}
    while True:
        more = {m for m, path in MODULES.items() if m not in reaching and own_imports(path) & reaching}
        if not more:
            return reaching
        reaching |= more
