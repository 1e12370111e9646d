"""How long an export takes, what it needs, and whether it passes.

    python benchmarks/exports.py DIR --to executorch -- --embedding 4

Runs `llamita export` in a process of its own and keeps a line of history for this machine; the last line
of the same model, form and machine is printed beside it. What follows `--` is handed to the command.
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
_SAME = ("model", "to", "options", "cpu")  # what makes two lines comparable


def run(source: str, form: str, options: list[str]) -> dict[str, Any]:
    """What the command says of an export that is thrown away."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "llamita", "export", source, "--to", form, "--json"]
        command += ["-o", f"{work}/out"]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llamita export ended with {done.returncode}")
    return json.loads(done.stdout)


def line_of(source: str, form: str, options: list[str], told: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run."""
    config, proof = PackedModel(Path(source)).config, told.get("proof") or {}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"), "cpu": cpu_name(),
        "model": f"{config.layers} layers of {config.hidden_size}, {config.vocab_size} tokens",
        "to": form, "options": options, "seconds": round(told["total_seconds"], 1),
        "steps": {step: round(seconds, 1) for step, seconds in told.get("seconds", {}).items()},
        "gigabytes": round(told["memory_bytes"] / 1e9, 2), "megabytes_written": round(told["bytes"] / 1e6, 1),
        "equal": [proof.get("equal_layers"), proof.get("layers")], "holds": proof.get("holds"),
    }  # fmt: skip


def main() -> None:
    """Run once, print, and add to the history."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a packed directory")
    parser.add_argument("--to", default="executorch")
    parser.add_argument("options", nargs="*", help="of llamita export, behind --")
    arguments = parser.parse_args()
    told = run(arguments.source, arguments.to, arguments.options)
    line = line_of(arguments.source, arguments.to, arguments.options, told)
    lines = [json.loads(text) for text in HISTORY.read_text().splitlines()] if HISTORY.exists() else []
    before = [old for old in lines if all(old[key] == line[key] for key in _SAME)]
    for name, found in (("before", before[-1] if before else None), ("now", line)):
        print(f"{name}: {json.dumps(found)}")
    with HISTORY.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
