"""Measure AMX against AVX-512 VNNI in one process, in turn: limits, linear layers, prefill, equal bits, lost tiles.

python benchmarks/amx.py [MODEL] [--threads N] [--rounds N] [--seconds S] [--history FILE]
python benchmarks/amx.py --portable     (AMX's stand-in, tiny sizes: tests this script on machines without AMX)
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rotations import time_in_turns

import llamita
from llamita import _native
from llamita.bench.speed import prefill, random_ids
from llamita.bench.tiles import VNNI
from llamita.engine.llm import LLM, PREFILL_CHUNK
from llamita.errors import LlamitaError
from llamita.numerics.affine import f32_to_bf16
from llamita.system.machine import cpu_name
from llamita.system.threads import use_threads

HISTORY = Path(__file__).parent / "history" / "amx.jsonl"
OVERSUBSCRIBED = 4  # threads for each core while tiles are watched


@dataclass(frozen=True)
class Sizes:
    """What is measured: the instruction set, and the sizes of layers and prompts."""

    isa: str
    rows: int
    columns: int
    groups: tuple[int, ...]
    tokens: tuple[int, ...]
    prompts: tuple[int, ...]


FULL = Sizes("amx", 2048, 8192, (32, 64, 128, 256), (8, 16, 32, 64, 128, 512), (512, 8192))
TINY = Sizes("amx-portable", 64, 512, (32, 128), (8, 33), (24,))


def limits(sizes: Sizes, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure multiply-adds in registers, in turn."""
    rates: dict[str, list[float]] = {sizes.isa: [], VNNI: []}
    for _ in range(rounds):
        for isa, found in rates.items():
            found.append(_native.int8_rate(isa))
    yield {"what": "limit", **{isa: round(median(found), 1) for isa, found in rates.items()}, "unit": "GMAC/s"}


def linear_layers(sizes: Sizes, rounds: int) -> Iterator[dict[str, Any]]:
    """Time a 4-bit linear layer with every group size and number of tokens, and compare its outputs."""
    rng = np.random.default_rng(0)
    codes = _native.codes_to_packed(rng.integers(-8, 8, (sizes.rows, sizes.columns), dtype=np.int8))
    for group_size in sizes.groups:
        scales = rng.uniform(0.001, 0.1, (sizes.rows, sizes.columns // group_size)).astype(np.float32)
        weights = _native.pack_w4([codes], [f32_to_bf16(scales)], group_size)
        for tokens in sizes.tokens:
            acts = _native.Activations(tokens, sizes.columns)
            _native.quantize(rng.standard_normal((tokens, sizes.columns), dtype=np.float32), acts)
            out = {isa: _native.new_buffer(tokens, sizes.rows) for isa in (sizes.isa, VNNI)}
            seconds = in_turns(sizes.isa, rounds, lambda isa, w=weights, a=acts, o=out: _native.linear(w, a, o[isa]))
            work = tokens * sizes.rows * sizes.columns / 1e9
            same = bool(np.array_equal(out[sizes.isa].view(np.uint32), out[VNNI].view(np.uint32)))
            yield result("linear", work, "GMAC/s", seconds, same, group_size=group_size, tokens=tokens)


def prompts(sizes: Sizes, rounds: int, llm: LLM) -> Iterator[dict[str, Any]]:
    """Time prompts of a model, and compare the logits after the first chunk."""
    for tokens in sizes.prompts:
        if tokens > llm.context:
            continue
        seconds = in_turns(sizes.isa, rounds, lambda _isa, n=tokens: prefill(llm, llm.new_sequence(n), n))
        logits = {}
        for isa in (sizes.isa, VNNI):
            _native.set_isa(isa)
            ids = random_ids(llm, min(tokens, PREFILL_CHUNK))
            logits[isa] = llm.model.step([(llm.new_sequence(len(ids)), ids)]).view(np.uint32)
        same = bool(np.array_equal(logits[sizes.isa], logits[VNNI]))
        yield result("prefill", tokens, "tok/s", seconds, same, model=Path(llm.path).name, tokens=tokens)


def tiles(sizes: Sizes, seconds: float) -> Iterator[dict[str, Any]]:
    """Count products that are wrong while more threads run than there are cores."""
    threads = OVERSUBSCRIBED * _native.usable_cpus()
    rounds, wrong = _native.check_products(sizes.isa, seconds, threads)
    yield {"what": "tiles", "seconds": seconds, "threads": threads, "products": rounds, "wrong": wrong}


def in_turns(isa: str, rounds: int, act: Callable[[str], object]) -> dict[str, list[float]]:
    """Return the seconds of every round, for each instruction set."""

    def on(name: str) -> Callable[[], object]:
        return lambda: (_native.set_isa(name), act(name))

    return time_in_turns({name: on(name) for name in (isa, VNNI)}, rounds)


def result(
    what: str, work: float, unit: str, seconds: dict[str, list[float]], same: bool, **about: Any
) -> dict[str, Any]:
    """Return the median rates, the median of each round's ratio, and whether all bits are the same."""
    (ours, theirs), rates = seconds.values(), {isa: work / median(times) for isa, times in seconds.items()}
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    figures = {isa: float(f"{rate:.4g}") for isa, rate in rates.items()}
    return {"what": what, **about, **figures, "unit": unit, "ratio": round(ratio, 3), "same_bits": same}


def line_of(found: dict[str, Any]) -> str:
    """Return one line of the table."""
    return " | ".join([found["what"], *(f"{key} {value}" for key, value in found.items() if key != "what")])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a packed model whose prefill is timed; by default none")
    parser.add_argument("--threads", type=int, help="by default one for each core")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement; a prompt has a third of them")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which tiles are watched")
    parser.add_argument("--history", type=Path, help=f"by default {HISTORY.name} of the history, for AMX alone")
    parser.add_argument("--portable", action="store_true", help="the stand-in of AMX, tiny sizes")
    return parser.parse_args()


def main() -> None:
    """Print a line for each measurement, and add it to the history at once."""
    arguments = parse()
    sizes = TINY if arguments.portable else FULL
    if sizes.isa not in _native.available_isas():
        sys.exit(f"{sizes.isa}: not offered here: CPU or system lacks it, or the check at the start found lost tiles")
    try:
        llm = llamita.load(arguments.model, threads=arguments.threads) if arguments.model else None
    except LlamitaError as error:
        sys.exit(str(error))
    if llm and llm.scheme is None:
        sys.exit(f"{arguments.model}: expected a packed model, got float weights, which no int8 product touches")
    history = arguments.history or (None if arguments.portable else HISTORY)
    threads, rounds = use_threads(arguments.threads), arguments.rounds
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"), "cpu": cpu_name(),
             "cores": _native.usable_cpus(), "threads": threads}  # fmt: skip

    def measure() -> Iterator[dict[str, Any]]:
        yield from limits(sizes, -(-rounds // 5))
        yield from tiles(sizes, arguments.seconds)
        yield from linear_layers(sizes, rounds)
        if llm:
            yield from prompts(sizes, -(-rounds // 3), llm)

    wrong = 0
    for found in measure():
        print(line_of(found), flush=True)
        wrong += found.get("wrong", 0) + (not found.get("same_bits", True))
        if history:
            with history.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, **found}) + "\n")
    if wrong:
        sys.exit(f"{wrong} results are wrong: AMX must not be used on this machine")


if __name__ == "__main__":
    main()
