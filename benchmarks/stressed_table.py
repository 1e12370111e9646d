"""Print the table of docs/results/embedded-model.md: what round to nearest loses on the stressed twins.

python benchmarks/stressed_table.py

Every twin computes the float model's function, so all are measured against the same float logits on the
same held-out text. For the last columns, the norms of the twin are folded before it is rounded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from llamita.evaluate.scores import Contender, score_text
from llamita.imports.open import resolve
from llamita.loading import load
from llamita.numerics.scheme import make_scheme

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from stress_embedded import save_twin

TWINS = {"embedded": set(), "basis": {"basis"}, "pairs": {"pairs"}, "basis and pairs": {"basis", "pairs"}}
SCHEMES = {"arm": make_scheme("arm"), "llama3.2": make_scheme("llama3.2"), "llamita": make_scheme("llamita")}


def losses(reference: Contender, twin: Path, text: str) -> list[float]:
    """Return the mean KL divergence from the float model: under each scheme, then unrounded."""
    rounded = [Contender(name, load(twin, scheme=scheme), False) for name, scheme in SCHEMES.items()]
    scores = score_text([reference, *rounded, Contender("float", load(twin), False)], text)
    return [score.kl.value for score in scores[1:] if score.kl]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=60_000, help="of the held-out text")
    args = parser.parse_args()
    model = resolve("embedded")
    text = (model / "heldout.txt").read_text("utf-8")[: args.characters]
    reference = Contender("embedded", load(model), True)
    table: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in TWINS.items():
            for fold in (False, True):
                out = Path(folder) / f"{name}-{fold}"
                save_twin(model, parts, out, fold=fold)
                table[name, fold] = losses(reference, out, text)
    print("| model | " + " | ".join(f"KL, {s}" for s in SCHEMES) + " | KL, float |"
          + "".join(f" folding wins back, {s} |" for s in SCHEMES))  # fmt: skip
    print("|---" * (2 + 2 * len(SCHEMES)) + "|")
    for name in TWINS:
        *rounded, unrounded = table[name, False]
        cells = [f"{value:.4f}" for value in rounded] + [f"{unrounded:.1e}"]
        for i, value in enumerate(rounded):
            excess = value - table["embedded", False][i]
            share = (value - table[name, True][i]) / excess if name != "embedded" else float("nan")
            cells.append(f"{share:.0%}" if share == share else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
