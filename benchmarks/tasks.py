"""Run three tasks from data to a 4-bit model, as a user does: the table of docs/guide/finetune.md.

    python benchmarks/tasks.py --data FOLDER --work DIR

For each task: `llamita finetune embedded --method full`, then `--method qat` on the result, in groups of 256.
`kept` is the share of the gain by tuning that the 4-bit model keeps, on held-out examples, in nats a learned token.
FOLDER holds eng_fra.tsv (Tatoeba), xquad_en.json (XQuAD) and instructions.json (records as Alpaca's).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = {  # file, tokens of a row, epochs in float
    "translation": ("eng_fra.tsv", 256, 3),
    "qa": ("xquad_en.json", 1024, 1),
    "assistant": ("instructions.json", 512, 3),
}
BATCH = 2048  # tokens of a step


def finetune(base: str, out: Path, task: str, data: Path, options: list[str]) -> dict[str, Any]:
    """Return the output of `llamita finetune --json`; keep it next to OUT, so that a stopped run resumes."""
    record = out.with_suffix(".json")
    if not record.exists():
        command = [sys.executable, "-m", "llamita", "finetune", base, "--data", str(data), "--task", task,
                   "-o", str(out), "--overwrite", "--json", *options]  # fmt: skip
        partial = record.with_suffix(".partial")
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        partial.write_text(ran.stdout, "utf-8")
        partial.rename(record)
    return json.loads(record.read_text("utf-8"))


def settings(**values: Any) -> list[str]:
    """Return the settings as options of the command."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def run_task(task: str, folder: Path, work: Path) -> list[str]:
    """Return a row of the table."""
    name, length, epochs = TASKS[task]
    common = {"length": length, "batch": BATCH // length, "micro_batch": BATCH // length, "held_out": 0.1}
    tuned = finetune(
        "embedded", work / f"{task}-tuned", task, folder / name,
        ["--method", "full", *settings(**common, epochs=epochs, learning_rate=1e-3)],
    )  # fmt: skip
    small = finetune(
        str(work / f"{task}-tuned"), work / f"{task}-4bit", task, folder / name,
        ["--method", "qat", "--group-size", "256", *settings(**common, learning_rate=3e-4)],
    )  # fmt: skip
    (_, before, scores), (_, after, tuned_scores) = tuned["scores"]
    _, least, small_scores = small["scores"][-1]
    kept = (before - least) / (before - after)
    losses = f"{before:.3f} | {after:.3f} | {least:.3f} | {kept:.1%}"
    measures = "; ".join(f"{m}: {scores[m]:.1f}, {tuned_scores[m]:.1f}, {small_scores[m]:.1f}" for m in scores)
    return [task, losses, measures]


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print("| task | before | after | after, 4-bit | kept | measures: before, after, 4-bit |")
    print("|---|---|---|---|---|---|")
    for task in arguments.tasks.split(","):
        print("| " + " | ".join(run_task(task, arguments.data, arguments.work)) + " |", flush=True)


if __name__ == "__main__":
    main()
