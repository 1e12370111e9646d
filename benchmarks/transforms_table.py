"""What equalizing and rotations do to rounding on the embedded model and its stressed twins: the table of
docs/methods.md.

python benchmarks/transforms_table.py [--twin plain|basis|pairs] [--calibration TEXT --steps 30]

KL divergence from the float model in nats a token x 1000, groups of 32, 128 and 256, preset llama3.2. The
twins compute the float model's function. Without a calibration text rotations stay random.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llamita.checkpoint import Checkpoint, resolve
from llamita.engine.llm import LLM, load
from llamita.evaluate import Contender, score_text
from llamita.methods.chain import parse_chain, transform
from llamita.methods.setup import Calibration, Setup
from llamita.quantize import RoundedSource
from llamita.scheme import make_scheme
from llamita.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from stress_embedded import calibration_tokens, stress

GROUPS = (32, 128, 256)
SAMPLES, LENGTH, BATCH = 128, 128, 4  # of the calibration text; samples in a step
ROWS = ("rtn", "equalize", "R1", "R2", "R4", "R1,R2", "R1,R2,R4", "equalize R4", "equalize R1,R2,R4")


def make_twin(model: Path, part: str, out: Path) -> Path:
    """Save a stressed twin of the embedded model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    twin = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = calibration_tokens(tokenizer, (model / "heldout.txt").read_text("utf-8"))
    stress(twin, tokens, {part}).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def calibration(path: Path | None, source: Checkpoint) -> Calibration | None:
    """The beginning of a text."""
    if path is None:
        return None
    text = path.read_text("utf-8")[: 8 * SAMPLES * LENGTH]
    ids = np.array(Tokenizer(source.path, source.config).encode(text), np.int32)[: SAMPLES * LENGTH]
    return Calibration(path.name, "", ids.reshape(SAMPLES, LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--twin", choices=("plain", "basis", "pairs"), default="plain")
    parser.add_argument("--characters", type=int, default=30_000, help="of the held-out text")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="of learning, with a calibration text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default=";".join(ROWS), help="which rows, separated by semicolons")
    args = parser.parse_args()
    model = resolve("embedded")
    text = (model / "heldout.txt").read_text("utf-8")[: args.characters]
    reference = Contender("float", load(model), True)
    with tempfile.TemporaryDirectory() as folder:
        path = model if args.twin == "plain" else make_twin(model, args.twin, Path(folder) / args.twin)
        source = Checkpoint(path)
        tokens = calibration(args.calibration, source)
        steps = args.steps if tokens else 0
        print("| method | " + " | ".join(f"g{group}" for group in GROUPS) + " |")
        print("|---" * (1 + len(GROUPS)) + "|")
        for row in args.rows.split(";"):
            *equalize, rotations = row.split()
            method = row if row in ("rtn", "equalize") else "+".join([*equalize, "spinquant"])
            settings = {"spinquant.rotations": rotations, "spinquant.steps": steps, "spinquant.batch": BATCH}
            setup = Setup(tokens, args.seed, settings=settings if "spinquant" in method else {})
            schemes = [make_scheme("llama3.2", group) for group in GROUPS]
            changed = transform(source, parse_chain(method), setup)
            rounded = [LLM(RoundedSource(changed, scheme)) for scheme in schemes]
            scores = score_text([reference, *(Contender("", llm, False) for llm in rounded)], text)
            kls = [f"{1000 * score.kl.value:.1f}" for score in scores[1:] if score.kl]
            print(f"| {row} | " + " | ".join(kls) + " |", flush=True)


if __name__ == "__main__":
    main()
