"""Load `llamita serve`, and llama.cpp's server beside it, and measure what the server must keep.

    python benchmarks/server.py MODEL                                  # every case of ours
    python benchmarks/server.py MODEL --llama-server PROGRAM --gguf FILE
    python benchmarks/server.py embedded:llama3.2 --small --history /tmp/try.jsonl
    python benchmarks/server.py --show                                 # the newest record of each case

Each case adds lines to benchmarks/history/serving.jsonl. It needs an idle machine. `docs/results/serving.md` says what
the figures mean, and how models and llama-server are made.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parent / "server"))

import cases_engine
import cases_limits
import cases_load
import cases_prompts
from records import machine
from server_bench import SMALL, Bench, Case, Sizes
from server_processes import LLAMA_SERVER
from server_report import report

from llamita import _native
from llamita.system.threads import use_threads

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history" / "serving.jsonl"
CASES: dict[str, Case] = {
    "overhead": cases_engine.overhead,
    "many": cases_engine.many,
    "equality": cases_engine.equality,
    "structured": cases_engine.structured,
    "tune": cases_load.tune,
    "load": cases_load.load,
    "long_prompt": cases_prompts.long_prompt,
    "second_turn": cases_prompts.second_turn,
    "restart": cases_prompts.restart,
    "disconnects": cases_limits.disconnects,
    "refusals": cases_limits.refusals,
    "goodput": cases_limits.goodput,
}


def main() -> None:
    """Run cases, and write each record as soon as it is there."""
    args = parse()
    lines = [json.loads(text) for text in args.history.read_text("utf-8").splitlines()] if args.history.exists() else []
    if args.show:
        print(report(lines))
        return
    use_threads(args.threads)
    bench = make_bench(args)
    here = machine(_native.isa(), args.threads)
    made, failed, began = [], False, time.monotonic()
    for name in args.only:
        print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr)
        try:
            for record in CASES[name](bench):
                when = {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}", "machine": here, "model": args.model_name}
                made.append({**when, **record, **({"note": args.note} if args.note else {})})
                args.history.parent.mkdir(parents=True, exist_ok=True)
                with args.history.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(made[-1]) + "\n")
        except Exception as error:  # the other cases can go on
            if args.strict:
                raise
            failed = True
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{time.monotonic() - began:6.0f} s", file=sys.stderr)
    print(report(made))
    raise SystemExit(failed)


def make_bench(args: argparse.Namespace) -> Bench:
    """Return the bench that the options describe."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, SMALL if args.small else Sizes(), args.threads, args.workdir, args.worded,
                  args.llama_server, args.gguf)  # fmt: skip
    if args.llama_options:
        bench.options = args.llama_options.split()
    return bench


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="as `llamita serve` takes it")
    parser.add_argument("--only", type=names, default=list(CASES), help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the harness")
    parser.add_argument("--worded", help="a model whose tokens are words, for structured output as well")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--gguf", type=Path, action="append", default=[],
                        help="its models; the first runs every load, others one of them")  # fmt: skip
    parser.add_argument("--llama-options", default="", help=f"in place of {' '.join(LLAMA_SERVER[0])}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model-name", default="Llama 3.2 1B's shape, random weights", help="for the records")
    parser.add_argument("--note", default="", help="a sentence for the records")
    parser.add_argument("--strict", action="store_true", help="end at the first case that fails")
    parser.add_argument("--workdir", type=Path, default=ROOT / "build" / "server", help="for logs")
    parser.add_argument("--history", type=Path, default=HISTORY)
    parser.add_argument("--show", action="store_true", help="measure nothing, show the history")
    args = parser.parse_args()
    if not args.model and not args.show:
        parser.error("MODEL is needed")
    if args.gguf and not args.llama_server:
        parser.error("--gguf needs --llama-server")
    return args


def names(text: str) -> list[str]:
    """Return the cases of a list."""
    found: list[Any] = text.split(",")
    if unknown := set(found) - set(CASES):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    return found


if __name__ == "__main__":
    main()
