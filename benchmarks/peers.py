"""Time llamita and llama.cpp, OpenVINO, ExecuTorch and transformers, in turn, on Llama 3.2 1B's shape.

    python benchmarks/peers.py                          # everything: installs, makes models, 5 rounds
    python benchmarks/peers.py --resume --rounds 2 --only llamita-g128,llamacpp-q4_0
    python benchmarks/render_results.py                 # docs/results/speed.md from what was measured

Each call begins a file in benchmarks/history or adds to one. It needs an idle machine, a package registry, a C++
compiler, 25 GB of disk and 20 GB of memory.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import records
import workers
from contenders import CASES, CONTENDERS

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history"
CHECK_PROMPT = 64  # tokens before the logits by which engines are compared
REFERENCE = "llamita-bf16"  # the logits of the others are compared with its logits
TUNING_CASE, TUNING_ROUNDS = "512", 3
WARM_UP_PROMPT = 512  # tokens at most, for a case with a longer prompt


class Race:
    """Holds the record of one run, and the processes that take part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.limits = workers.start_limits(args.workdir, args.threads)
        self.path, self.record = self._open_record()
        self.running: dict[str, workers.Worker] = {}
        self.last_limits: dict[str, Any] | None = None  # set only if a run came last
        if args.note and args.note not in self.record["notes"]:
            self.record["notes"].append(args.note)

    def _open_record(self) -> tuple[Path, dict[str, Any]]:
        """Return the newest record of this machine, or an empty one."""
        machine = records.machine(self.limits.about["settings"]["isa"], self.args.threads)
        name = records.slug(machine["cpu"])
        if self.args.resume and (files := sorted(self.args.history.glob(f"*-{name}.json"))):
            record = json.loads(files[-1].read_text("utf-8"))
            if record["machine"] != machine:
                raise SystemExit(f"{files[-1]}: measured on another machine; run without --resume")
            return files[-1], record
        now = datetime.datetime.now(datetime.UTC)
        path = self.args.history / f"{now:%Y-%m-%dT%H%M}-{name}.json"
        record = {
            "format": records.FORMAT,
            "started": f"{now:%Y-%m-%dT%H:%MZ}",
            "model": "Llama 3.2 1B's shape, random weights",
            "machine": machine,
            "definitions": records.DEFINITIONS,
            "contenders": {},
            "notes": [],
            "tuning": {},
            "failures": {},
            "timings": [],
        }
        return path, record

    def enter(self, name: str) -> None:
        """Start a contender and record what it is, or its failure."""
        self.last_limits = None
        try:
            variant = self._variant(name)
            print(f"starting {name} ({variant})", file=sys.stderr)
            worker = workers.start(self.args.workdir, name, variant, self.args.threads)
            self.running[name] = worker
            about = worker.about
            size = workers.model_bytes(self.args.workdir, CONTENDERS[name])
            known = self.record["contenders"].get(name)
            contender = CONTENDERS[name]
            entry = {"label": contender.label, "weights": contender.weights, "size_bytes": size,
                     "variant": variant, **about}  # fmt: skip
            if known and any(known[key] != entry[key] for key in ("version", "settings", "size_bytes")):
                raise SystemExit(f"{name}: {self.path} has it in another version; run without --resume")
            self.record["contenders"][name] = {**entry, **(known or {})}
            self._warm_up(worker, name)
        except workers.PeerError as error:
            self._fail(name, error)

    def _warm_up(self, worker: workers.Worker, name: str) -> None:
        for case in self._cases(name):
            shape = CASES[case]
            prompt = min(shape.prompt, WARM_UP_PROMPT)
            worker.ask(do="run", prompt=prompt, new=2, sequences=shape.sequences, seed=0)

    def _cases(self, name: str) -> list[str]:
        return [case for case in self.args.cases if case in CONTENDERS[name].cases]

    def _variant(self, name: str) -> str:
        """Return the fastest settings that --tune has measured on this machine, else the default ones."""
        return self.record["tuning"].get(name, {}).get("best", next(iter(CONTENDERS[name].variants)))

    def tune(self, name: str) -> None:
        """Measure the fastest settings, unless there is no choice or the record has them."""
        if len(CONTENDERS[name].variants) > 1 and name not in self.record["tuning"]:
            try:
                self.record["tuning"][name] = self._tune(name)
            except workers.PeerError as error:
                self._fail(name, error)
            records.write(self.path, self.record)

    def _tune(self, name: str) -> dict[str, Any]:
        """Return the seconds of every variant, in turn; the best has the least median of prompt plus tokens."""
        shape = CASES[TUNING_CASE]
        racers: dict[str, workers.Worker] = {}
        seconds: dict[str, list[list[float]]] = {variant: [] for variant in CONTENDERS[name].variants}
        try:
            for variant in seconds:
                racers[variant] = workers.start(self.args.workdir, name, variant, self.args.threads)
            for round_ in range(TUNING_ROUNDS + 1):
                for variant, worker in racers.items():
                    run = worker.ask(do="run", prompt=shape.prompt, new=shape.new, sequences=1, seed=1000 + round_)
                    if round_:  # the first warms up
                        seconds[variant].append([run["prefill_seconds"], run["decode_seconds"]])
        finally:
            for worker in racers.values():
                worker.close()
        best = min(seconds, key=lambda variant: statistics.median(map(sum, seconds[variant])))
        print(f"{name}: {best} is fastest of {', '.join(seconds)}", file=sys.stderr)
        return {"best": best, "prefill_and_decode_seconds": seconds}

    def check(self) -> None:
        """Compare every engine's logits with the reference: all must have computed the same model."""
        shown: dict[str, list[float]] = {}
        for name in sorted(self.running, key=lambda name: name != REFERENCE):
            try:
                shown[name] = self.running[name].ask(do="logits", prompt=CHECK_PROMPT)["logits"]
            except workers.PeerError as error:
                self._fail(name, error)
                continue
            entry = self.record["contenders"][name]
            entry["logits_are_finite"] = all(abs(x) < float("inf") for x in shown[name])
            if REFERENCE in shown and CONTENDERS[name].layers == CONTENDERS[REFERENCE].layers:
                entry["logits_correlation"] = round(statistics.correlation(shown[REFERENCE], shown[name]), 5)

    def round(self, number: int) -> None:
        """Run every contender once in every case."""
        for case in self.args.cases:
            for name in [name for name in self.running if case in CONTENDERS[name].cases]:
                try:
                    self._time(number, case, name)
                except workers.PeerError as error:
                    self._fail(name, error)

    def _time(self, number: int, case: str, name: str) -> None:
        shape = CASES[case]
        before = self.last_limits or self.limits.ask(do="limits")
        run = self.running[name].ask(
            do="run", prompt=shape.prompt, new=shape.new, sequences=shape.sequences, seed=number
        )
        after = self.last_limits = self.limits.ask(do="limits")
        run |= {key: (before[key] + after[key]) / 2 for key in before}
        entry = self.record["contenders"][name]
        entry["peak_memory_bytes"] = max(entry.get("peak_memory_bytes", 0), run.pop("peak_memory_bytes"))
        self.record["timings"].append({"round": number, "case": case, "contender": name, **run})
        records.write(self.path, self.record)
        tokens = shape.sequences * shape.prompt, shape.sequences * shape.new
        rates = tokens[0] / run["prefill_seconds"], tokens[1] / run["decode_seconds"]
        vnni = f" (VNNI {run['vnni_rate']:.0f})" if "vnni_rate" in run else ""
        limits = f"{run['int8_rate']:.0f} GMAC/s{vnni}, {run['read_bandwidth']:.1f} GB/s"
        print(f"round {number} {case:>5} {name:18} {rates[0]:7.1f} {rates[1]:7.2f} tok/s   ({limits})")

    def _fail(self, name: str, error: workers.PeerError) -> None:
        self.last_limits = None  # the failure may have taken minutes
        print(f"{name}: {error}", file=sys.stderr)
        self.record["failures"][name] = str(error).replace(str(self.args.workdir), "WORKDIR")
        if worker := self.running.pop(name, None):
            worker.close()

    def leave(self) -> None:
        """End every contender's process."""
        for worker in self.running.values():
            worker.close()
        self.running.clear()


def main() -> None:
    args = parse()
    if args.prepare:
        for name in args.only:
            try:
                workers.python_of(args.workdir, CONTENDERS[name].environment)
                workers.model_of(args.workdir, CONTENDERS[name].model)
            except workers.PeerError as error:
                print(f"{name}: {error}", file=sys.stderr)
        return
    args.history.mkdir(parents=True, exist_ok=True)
    race = Race(args)
    first = 1 + max((timing["round"] for timing in race.record["timings"]), default=0)
    together = [name for name in args.only if not CONTENDERS[name].alone]
    if args.tune:
        for name in args.only:  # before anything else takes memory
            race.tune(name)
    groups = [together, *([name] for name in args.only if CONTENDERS[name].alone)]
    for group in filter(None, groups):
        for name in group:
            race.record["failures"].pop(name, None)
            race.enter(name)
        if args.check:
            race.check()
        for number in range(first, first + args.rounds):
            race.round(number)
        race.leave()
    records.write(race.path, race.record)
    race.limits.close()
    print(race.path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda known: lambda text: [check_name(name, known) for name in text.split(",")]  # noqa: E731
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs (5)")
    parser.add_argument("--only", type=names(CONTENDERS), default=list(CONTENDERS),
                        help=f"some of: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--cases", type=names(CASES), default=["512"], help=f"some of: {', '.join(CASES)} (512)")
    parser.add_argument("--resume", action="store_true", help="add to this machine's newest record")
    parser.add_argument("--tune", action="store_true", help="first find each peer's fastest settings")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare logits")
    parser.add_argument("--prepare", action="store_true", help="install and make models, time nothing")
    parser.add_argument("--note", default="", help="a sentence to show above the tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=ROOT / "build" / "peers", help="environments, models")
    parser.add_argument("--history", type=Path, default=HISTORY)
    args = parser.parse_args()
    args.workdir = args.workdir.resolve()
    return args


def check_name(name: str, known: dict[str, Any]) -> str:
    if name not in known:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name}")
    return name


if __name__ == "__main__":
    main()
