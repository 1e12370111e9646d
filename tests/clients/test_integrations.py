"""What ships for other programs: the balancer's experiment, and the provider package for OGX."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from places import ROOT

PACKAGE = ROOT / "integrations" / "ogx-provider-llamita"
MODULES = PACKAGE / "src" / "ogx_provider_llamita"


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: apt-get install nginx-light")
def test_no_request_is_lost_when_a_server_is_killed(tmp_path: Path) -> None:
    """Those whose answer had not begun go to the other server; every answer is the same as alone."""
    program = ROOT / "examples" / "balancer" / "try.py"
    done = subprocess.run(
        [sys.executable, program, "--requests", "4"], capture_output=True, text=True, timeout=300,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(count) for count, what in re.findall(r"^ *(\d+)  (.*)$", done.stdout, flags=re.M)}
    assert counts["answer whole"] == 16
    assert counts["stream whole"] + counts.get("stream broken off", 0) == 16


def test_the_parts_of_the_provider_package_name_each_other() -> None:
    """OGX finds modules, classes and functions by these names; it itself was run by hand (README.md there)."""
    specs = {
        _text(call, "provider_type"): call
        for call in ast.walk(ast.parse((MODULES / "provider.py").read_text()))
        if isinstance(call, ast.Call) and any(k.arg == "provider_type" for k in call.keywords)
    }
    assert set(specs) == {"remote::llamita", "inline::llamita"}
    tree = ast.parse((MODULES / "config.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for spec in specs.values():
        assert _text(spec, "module") == MODULES.name
        module, _, name = _text(spec, "config_class").rpartition(".")
        assert (module, name in classes) == (f"{MODULES.name}.config", True)
    functions = {
        node.name for node in ast.parse((MODULES / "__init__.py").read_text()).body
        if isinstance(node, ast.AsyncFunctionDef)
    }  # fmt: skip
    assert functions == {"get_adapter_impl", "get_provider_impl"}


def test_the_configuration_for_ogx_uses_the_package() -> None:
    (provider,) = yaml.safe_load((PACKAGE / "run.yaml").read_text())["providers"]["inference"]
    assert (provider["provider_type"], provider["module"]) == ("remote::llamita", MODULES.name)
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert project["name"].replace("-", "_") == MODULES.name


def _text(call: ast.Call, name: str) -> str:
    (value,) = [keyword.value for keyword in call.keywords if keyword.arg == name]
    assert isinstance(value, ast.Constant)
    return str(value.value)
