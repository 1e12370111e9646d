"""Measure short and long texts and many sequences, in turn: prefill, and decoding against the read bandwidth.

python benchmarks/lengths.py MODEL [--kv-cache TYPE ...] [--rounds N] [--history FILE]

MODEL is a packed model whose context has 8,448 tokens or more, such as `benchmarks/random_checkpoint.py` makes.
It needs an idle machine.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rotations import time_in_turns

import llamita
from llamita import _native
from llamita.bench.speed import decode, prefill
from llamita.bench.work import count_work
from llamita.engine.llm import LLM
from llamita.system.machine import cpu_name

HISTORY = Path(__file__).parent / "history" / "lengths.jsonl"
SHORT, LONG = 512, 8192  # tokens
STEPS = 16  # decoded at a time
TOGETHER = 8  # sequences
_PROBED = 1 << 29  # bytes read to find the bandwidth


def measure(llm: LLM, rounds: int) -> dict[str, Any]:
    """Return rates and shares of one model with one type of cache."""
    short, long = llm.new_sequence(SHORT + STEPS), llm.new_sequence(LONG + STEPS)
    many = [llm.new_sequence(SHORT + STEPS) for _ in range(TOGETHER)]
    for sequence in (short, *many):
        prefill(llm, sequence, SHORT)
    prefill(llm, long, LONG)
    bandwidths: list[float] = []
    actions: dict[str, Callable[[], object]] = {
        "prefill_short": lambda: prefill(llm, llm.new_sequence(SHORT), SHORT),
        "decode_short": lambda: decode(llm, [short], STEPS),
        "read": lambda: bandwidths.append(_native.read_bandwidth(_PROBED)),
        "decode_long": lambda: decode(llm, [long], STEPS),
        "decode_many": lambda: decode(llm, many, STEPS),
    }
    seconds = time_in_turns(actions, 4 * rounds)
    seconds |= time_in_turns({"prefill_long": lambda: prefill(llm, llm.new_sequence(LONG), LONG)}, rounds)
    times = {name: median(found) for name, found in seconds.items()}
    work = count_work(llm.config, llm.scheme, llm.kv_dtype)
    bandwidth = 1e9 * median(bandwidths)

    def of_bandwidth(tokens: int, name: str) -> float:
        return work.decode_bytes(tokens, STEPS) * STEPS / times[name] / bandwidth

    return {
        "prefill_512": SHORT / times["prefill_short"],
        "prefill_8192": LONG / times["prefill_long"],
        "prefill_8192_of_512": LONG / times["prefill_long"] * times["prefill_short"] / SHORT,
        "decode_512": STEPS / times["decode_short"],
        "decode_8192": STEPS / times["decode_long"],
        "bandwidth": bandwidth / 1e9,
        "decode_512_of_bandwidth": of_bandwidth(SHORT, "decode_short"),
        "decode_8192_of_bandwidth": of_bandwidth(LONG, "decode_long"),
        "eight_of_one": TOGETHER * times["decode_short"] / times["decode_many"],
    }


def main() -> None:
    """Print a line for each type of cache, and add it to the history."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-cache", nargs="+", default=["int8", "f16"])
    parser.add_argument("--rounds", type=int, default=3, help="of a long prompt; all else has four times as many")
    parser.add_argument("--history", type=Path, default=HISTORY)
    arguments = parser.parse_args()
    for kind in arguments.kv_cache:
        llm = llamita.load(arguments.model, kv_dtype=kind)
        found = {name: float(f"{value:.3g}") for name, value in measure(llm, arguments.rounds).items()}
        now = datetime.datetime.now(datetime.UTC)
        about = {"date": f"{now:%Y-%m-%dT%H:%MZ}", "cpu": cpu_name(), "isa": _native.isa(),
                 "threads": _native.threads(), "model": Path(llm.path).name, "kv_cache": kind}  # fmt: skip
        with arguments.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(about | found) + "\n")
        print(" | ".join([kind, *(f"{name} {value:g}" for name, value in found.items())]), flush=True)


if __name__ == "__main__":
    main()
