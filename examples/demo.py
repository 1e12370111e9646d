"""Do the main job on the embedded model: quantize it four ways, compare each with BF16, tell a story.

Everything that is printed is measured in this run. Speeds and memory come from a fresh process per
model, one after the other; quality from the model's own held-out text.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import llamita
from llamita import _native
from llamita.bench.speed import measure_speed
from llamita.commands import console
from llamita.evaluate.contenders import open_contenders
from llamita.evaluate.scores import TextScores, embedded_text, score_text
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.verify import verify
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.text.printable import megabytes

OUT = Path("build/demo")
MODELS = {  # preset, group size, method
    "arm 256": ("arm", 256, "rtn"),
    "arm 128": ("arm", 128, "rtn"),
    "llama3.2": ("llama3.2", None, "rtn"),
    "equalized": ("llama3.2", None, "equalize"),
}
BEST = "equalized"  # without Torch, which `--preset llamita` needs
STORY = "Once upon a time"
LEGEND = """KL: nats per token from BF16, ± half of the 95 % interval. Speeds: a prompt of 512 tokens,
then 128 more, on {threads} threads ({isa}). Memory: what loading and running added to the process."""


def main() -> None:
    """Print the table and the story."""
    if sys.argv[1:]:  # this script calls itself for one model in a fresh process
        print(json.dumps(measure(sys.argv[1])))
        return
    began = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    paths = {name: OUT / name.replace(" ", "-") for name in MODELS}
    source = Checkpoint(resolve("embedded"))
    for name, (preset, group_size, method) in MODELS.items():
        quantize(source, "embedded", paths[name], make_scheme(preset, group_size), method, overwrite=True)
        if verify(paths[name]).problems:
            raise SystemExit(f"{paths[name]}: is not as it was written; see `llamita verify`")
    source.close()
    speeds = [measure_apart(path) for path in ["embedded", *map(str, paths.values())]]
    text = embedded_text()
    contenders = open_contenders([str(path) for path in paths.values()], baseline="embedded")
    with console.progress() as progress:
        scores = score_text(contenders, text, progress=progress)
    rows = [
        row(name, contender.weight_bytes, score, speed)
        for name, contender, score, speed in zip(["BF16", *MODELS], contenders, scores, speeds, strict=True)
    ]
    title = f"The embedded model on {scores[0].tokens:,} tokens that it wrote itself"
    columns = ["model", "size", "perplexity", "KL", "agreement", "prefill tok/s", "decode tok/s", "memory"]
    console.print_table(title, columns, rows)
    print(LEGEND.format(threads=_native.threads(), isa=_native.isa()))
    print(f"\n{STORY}", end="")
    for piece in llamita.load(paths[BEST]).stream(STORY, max_tokens=200, temperature=0.7, seed=1):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
    again = f".venv/bin/llamita generate {paths[BEST]} --prompt 'A little dog'"
    print(f"\n\n{time.monotonic() - began:.0f} s. Go on: {again}")
    print("Or chat on a page: .venv/bin/pip install '.[serve]', then .venv/bin/llamita serve embedded")


def row(name: str, size: int, score: TextScores, speed: dict[str, float]) -> list[str]:
    """Return one line of the table; intervals are 95 % block bootstraps."""
    kl = f"{score.kl.value:.4f} ±{(score.kl.high - score.kl.low) / 2:.4f}" if score.kl else "0"
    agreement = f"{score.agreement.value:.1%}" if score.agreement else "100%"
    return [
        name,
        megabytes(size),
        f"{score.perplexity:.3f}",
        kl,
        agreement,
        f"{speed['prefill']:,.0f}",
        f"{speed['decode']:,.0f}",
        megabytes(speed["memory"]),
    ]


def measure_apart(model: str) -> dict[str, float]:
    """Measure speeds and memory of a model in a fresh process."""
    result = subprocess.run([sys.executable, __file__, model], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def measure(model: str) -> dict[str, float]:
    """Return tokens per second, and the bytes of memory by which loading and running the model grew the process."""
    llamita.load  # noqa: B018  import it before the first reading, so that code does not count as memory of the model
    before = resident_bytes()
    llm = llamita.load(model)
    speed = measure_speed(llm)
    return {"prefill": speed.prefill, "decode": speed.decode, "memory": resident_bytes() - before}


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 outside of Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


if __name__ == "__main__":
    main()
