"""Measure the time and memory of an export, and check that it passes.

    python benchmarks/exports.py DIR --to executorch -- --embedding 4

It runs `llamita export` in its own process and adds a line to the history of this machine. It prints the last line
of the same model, format and machine with it. The arguments after `--` go to the command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamita.models.packed import PackedModel
from llamita.system.machine import cpu_name

HISTORY = Path(__file__).parent / "history" / "exports.jsonl"
_SAME = ("model", "to", "options", "cpu")  # comparable lines agree in these


def run(source: str, form: str, options: list[str]) -> dict[str, Any]:
    """Run an export whose result is thrown away; return the output of the command."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "llamita", "export", source, "--to", form, "--json"]
        command += ["-o", f"{work}/out"]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llamita export ended with {done.returncode}")
    return json.loads(done.stdout)


def line_of(source: str, form: str, options: list[str], output: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run."""
    config, proof = PackedModel(Path(source)).config, output.get("proof") or {}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"), "cpu": cpu_name(),
        "model": f"{config.layers} layers of {config.hidden_size}, {config.vocab_size} tokens",
        "to": form, "options": options, "seconds": round(output["total_seconds"], 1),
        "steps": {step: round(seconds, 1) for step, seconds in output.get("seconds", {}).items()},
        "gigabytes": round(output["memory_bytes"] / 1e9, 2), "megabytes_written": round(output["bytes"] / 1e6, 1),
        "equal": [proof.get("equal_layers"), proof.get("layers")], "holds": proof.get("holds"),
    }  # fmt: skip


def main() -> None:
    """Run once, print, and add to the history."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a packed model")
    parser.add_argument("--to", default="executorch")
    parser.add_argument("options", nargs="*", help="of llamita export, after --")
    arguments = parser.parse_args()
    output = run(arguments.source, arguments.to, arguments.options)
    line = line_of(arguments.source, arguments.to, arguments.options, output)
    lines = [json.loads(text) for text in HISTORY.read_text().splitlines()] if HISTORY.exists() else []
    before = [old for old in lines if all(old[key] == line[key] for key in _SAME)]
    for name, found in (("before", before[-1] if before else None), ("now", line)):
        print(f"{name}: {json.dumps(found)}")
    with HISTORY.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
