"""Run one cell of the tables, in its own process so that its time and memory can be measured.

    python worker.py JOB.json

Quantizes a model as the job says and scores the result against the float model, token by token.
Writes two files next to the job: JOB.npz has the tokens' losses, KL and agreement, and JOB.result.json
has time and memory.
"""

import fcntl
import hashlib
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.engine.llm import LLM
from llamita.evaluate.lm_eval import run_tasks
from llamita.evaluate.scores import Contender, score_tokens
from llamita.evaluate.wikitext import read as read_wikitext
from llamita.methods import chain as chains
from llamita.methods.chain import Chain, parse_chain
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import make_scheme
from llamita.quantize.calibration import load_calibration
from llamita.quantize.rounded import RoundedSource


def calibrate(source: Checkpoint, job: dict[str, Any]) -> Setup:
    """Return the setup that the chain begins with."""
    text = None
    if job["calibration"]:
        text = load_calibration(job["calibration"], source, job["samples"], job["length"], job["seed"])
    return Setup(text, job["seed"], settings=job["settings"])


def transform(
    source: Checkpoint, job: dict[str, Any], chain: Chain, setup: Setup, work: Path
) -> tuple[Any, float, int]:
    """Return the source after the chain's transforms, their CPU seconds, and the peak of memory.

    Rotations do not depend on how weights are rounded. So rows that learn the same ones on the same text
    share them through a work directory. All of these rows count the seconds and the memory of the first.
    """
    if not chain.transforms:
        return source, 0.0, 0
    own = {name: value for name, value in setup.settings.items() if name.startswith("spinquant.")}
    text = setup.calibration.record() if setup.calibration else None
    known = [job["revision"], job["twin"], chain.transforms, own, text, setup.seed]
    work = work / f"transforms-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]}"
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second of two rows waits, and uses what the first has learned
        took = json.loads((work / "took").read_text()) if (work / "took").exists() else None
        began = time.process_time()
        changed = chains.transform(source, chain, replace(setup, work=work))
        if took is None:
            took = {"seconds": time.process_time() - began, "peak_bytes": peak_bytes()}
            (work / "took").write_text(json.dumps(took))
    return changed, took["seconds"], took["peak_bytes"]


def peak_bytes() -> int:
    """Return the peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quantize(source: Checkpoint, job: dict[str, Any], work: Path) -> tuple[LLM, float, int]:
    """Return the rounded model, the CPU seconds without writing text, and the peak of memory."""
    if job["method"] == "none":
        return LLM(source), 0.0, peak_bytes()
    setup, chain = calibrate(source, job), parse_chain(job["method"])
    changed, seconds, peak = transform(source, job, chain, setup, work)
    began = time.process_time()
    scheme = make_scheme("llama3.2", job["group_size"], job["scales"])
    rounded = LLM(RoundedSource(changed, scheme, str(replace(chain, transforms=())), setup))
    return rounded, seconds + time.process_time() - began, max(peak, peak_bytes())


def main() -> None:
    place = Path(sys.argv[1])
    job = json.loads(place.read_text("utf-8"))
    rounded, seconds, peak = quantize(Checkpoint(Path(job["model"])), job, place.parent)
    reference = Contender("float", LLM(Checkpoint(Path(job["reference"]))), True)
    tokens = score_tokens([reference, Contender("rounded", rounded, False)], job["text"])
    wikitext = None
    if job["wikitext"]:
        pages = read_wikitext(Path(job["wikitext"])).pages
        wikitext = run_tasks([rounded], ["wikitext"], pages=pages)[0][0].metrics
    np.savez(place.with_suffix(".npz"), losses=tokens.losses[1], kl=tokens.kl[1], agrees=tokens.top[0] == tokens.top[1])
    result = {"seconds": seconds, "peak_bytes": peak, "wikitext": wikitext}
    place.with_suffix(".result.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
