"""Measure the loss by every method on the embedded model and its stressed twins: docs/results/quality.md.

    python benchmarks/quality.py --text DIR                  # everything; a stopped run resumes
    python benchmarks/quality.py --text DIR --twins plain --groups 32 --seeds 0 --rows gptq,qronos
    python benchmarks/quality.py --text DIR --render         # the page from finished cells

DIR holds tinystories_train.txt (calibration on real text) and tinystories_valid.txt (scored; no calibration has seen
it). Every cell of the tables runs in its own process; its record stays in --work.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "quality"), str(ROOT / "tools")]

import tables  # noqa: E402
from page import render  # noqa: E402
from rows import GROUP_SIZES, LENGTH, REVISION, ROWS, SAMPLES, SEEDS, TWINS, YARDSTICK  # noqa: E402
from stories import SCORED, read_stories, write_stories  # noqa: E402

from llamita.imports.open import resolve  # noqa: E402


def make_twin(parts: set[str], out: Path) -> Path:
    """Return the embedded model, or make its stressed twin in `out`."""
    model = resolve("embedded")
    if not parts or out.exists():
        return out if parts else model
    partial = out.with_name(f"{out.name}.partial")
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "stress_embedded.py"), "--model", str(model),
         "--out", str(partial), "--parts", ",".join(sorted(parts))], check=True,
    )  # fmt: skip
    return partial.rename(out)


def jobs(args: argparse.Namespace) -> Iterator[tuple[tuple[str, int, str, int], dict[str, Any]]]:
    """Yield for every cell asked for its key (twin, group size, row, seed) and the job of its worker."""
    scored = read_stories(args.text / "tinystories_valid.txt")[SCORED]
    real = write_stories(args.text / "tinystories_train.txt", args.work / "stories.txt")
    sha256 = hashlib.sha256(real.read_bytes()).hexdigest()
    for seed in args.seeds:
        for group_size in args.groups:
            for twin in args.twins:
                model = make_twin(TWINS[twin], args.work / f"twin-{twin}")
                for name in args.rows:
                    row = ROWS[name]
                    if not row.runs(twin, seed):
                        continue
                    reads_wikitext = row.on_wikitext and twin == "plain" and seed == SEEDS[0]
                    yield (
                        (twin, group_size, name, seed),
                        {
                            "twin": twin, "model": str(model), "reference": str(resolve("embedded")),
                            "text": scored,
                            "group_size": group_size, "method": row.method, "scales": row.scales,
                            "calibration": {"real": str(real)}.get(row.calibration, row.calibration),
                            "on": [row.calibration, sha256], "revision": REVISION,
                            "settings": row.settings, "seed": seed, "samples": SAMPLES, "length": LENGTH,
                            "wikitext": str(args.wikitext or "") if reads_wikitext else "",
                        },
                    )  # fmt: skip


def result_of(place: Path) -> dict[str, Any] | None:
    """Return the result of a finished cell, None for others."""
    path = place.with_suffix(".result.json")
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def run(job: dict[str, Any], place: Path) -> bool:
    """Run a cell unless it is finished, with LM Eval if asked for; return whether it is finished now."""
    result = result_of(place)
    if result is not None and (result["wikitext"] or not job["wikitext"]):
        return True
    place.write_text(json.dumps(job), "utf-8")
    one_thread = {"LLAMITA_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "quality" / "worker.py"), str(place)], env=os.environ | one_thread, check=False
    )
    return done.returncode == 0


def run_and_tell(key: tuple[str, int, str, int], job: dict[str, Any], work: Path) -> None:
    """Run a cell and print a line about it."""
    twin, group_size, name, seed = key
    place = place_of(work, job)
    if not run(job, place):
        print(f"failed: {key}", flush=True)
        return
    kl = np.load(place.with_suffix(".npz"))["kl"].mean()
    print(f"{twin:6} g{group_size:<4} seed {seed}  KL {kl:.4f}  {name}", flush=True)


def place_of(work: Path, job: dict[str, Any]) -> Path:
    """Return the path of a cell's record, named by all that it depends on except the places of the models."""
    elsewhere = {"model", "reference", "wikitext"} | ({"calibration"} if job["calibration"] != "self" else set())
    known = json.dumps({key: job[key] for key in job if key not in elsewhere}, sort_keys=True)
    return work / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"


def collect(args: argparse.Namespace) -> tables.Cells:
    """Return the finished cells, with the seeds of each joined."""
    found: dict[tuple[str, int, str], list[tuple[Any, dict[str, Any]]]] = {}
    for (twin, group_size, name, _), job in jobs(args):
        place = place_of(args.work, job)
        if (result := result_of(place)) is not None:
            found.setdefault((twin, group_size, name), []).append((np.load(place.with_suffix(".npz")), result))
    return {key: _cell(runs) for key, runs in found.items()}


def _cell(runs: list[tuple[Any, dict[str, Any]]]) -> tables.Cell:
    def mean(name: str) -> np.ndarray:
        return np.mean([arrays[name] for arrays, _ in runs], axis=0)

    words = [r["wikitext"]["word_perplexity"] for _, r in runs if r["wikitext"]]
    return tables.Cell(
        kl=mean("kl"), losses=mean("losses"), agrees=mean("agrees"),
        seeds=tuple(float(arrays["kl"].mean()) for arrays, _ in runs),
        seconds=float(np.median([r["seconds"] for _, r in runs])),
        peak_bytes=float(np.median([r["peak_bytes"] for _, r in runs])),
        wikitext=float(np.mean(words)) if words else None,
    )  # fmt: skip


def _names(known: Any) -> Any:
    def parse(text: str) -> list[Any]:
        kind = type(next(iter(known)))
        chosen = [kind(name.strip()) for name in text.split(",")]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {list(known)}, got {unknown}")
        return chosen

    return parse


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="directory with the texts")
    parser.add_argument("--wikitext", type=Path, help="wiki.test.raw, scored by LM Eval with the first seed")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--twins", type=_names(TWINS), default=list(TWINS))
    parser.add_argument("--groups", type=_names(GROUP_SIZES), default=list(GROUP_SIZES))
    parser.add_argument("--seeds", type=_names(SEEDS), default=list(SEEDS))
    parser.add_argument("--rows", type=_names(ROWS), default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--render", action="store_true", help="run nothing, write docs/results/quality.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "quality.md")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.render:
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in pool.map(lambda pair: run_and_tell(*pair, args.work), jobs(args)):
                pass
        return
    cells = collect(args)
    if not any(name == YARDSTICK for _, _, name in cells):
        raise SystemExit(f"{args.work}: expected at least '{YARDSTICK}' among the finished cells, found none")
    args.out.write_text(render(cells), "utf-8")


if __name__ == "__main__":
    main()
