"""One cell of the table, in a process of its own so that time and memory are its own.

    python worker.py JOB.json

Quantizes a model as the job says, scores the result against the float model token by token, and writes
beside the job: JOB.npz with the tokens' losses, KL and agreement, JOB.result.json with time and memory.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llamita.calibration import load_calibration
from llamita.checkpoint import Checkpoint
from llamita.engine.llm import LLM
from llamita.evaluate import Contender, score_tokens
from llamita.harness import run_tasks
from llamita.methods.setup import Setup
from llamita.quantize import RoundedSource
from llamita.scheme import make_scheme
from llamita.wikitext import read as read_wikitext


def calibrate(source: Checkpoint, job: dict[str, Any]) -> Setup:
    """What the chain begins with."""
    if not job["calibration"]:
        return Setup(seed=job["seed"])
    text = load_calibration(job["calibration"], source, job["samples"], job["length"], job["seed"])
    return Setup(text, job["seed"], settings=job["settings"])


def main() -> None:
    place = Path(sys.argv[1])
    job = json.loads(place.read_text("utf-8"))
    source = Checkpoint(Path(job["model"]))
    began = time.perf_counter()
    setup = calibrate(source, job)
    between = time.perf_counter()
    scheme = make_scheme("llama3.2", job["group_size"], job["scales"])
    rounded = LLM(RoundedSource(source, scheme, job["method"], setup))
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reference = Contender("float", LLM(Checkpoint(Path(job["reference"]))), True)
    tokens = score_tokens([reference, Contender("rounded", rounded, False)], job["text"])
    wikitext = None
    if job["wikitext"]:
        pages = read_wikitext(Path(job["wikitext"])).pages
        wikitext = run_tasks([rounded], ["wikitext"], pages=pages)[0][0].metrics
    np.savez(place.with_suffix(".npz"), losses=tokens.losses[1], kl=tokens.kl[1],
             agrees=tokens.top[0] == tokens.top[1], float_losses=tokens.losses[0])  # fmt: skip
    result = {"calibration_seconds": between - began, "seconds": ended - between, "peak_bytes": peak,
              "wikitext": wikitext}  # fmt: skip
    place.with_suffix(".result.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
