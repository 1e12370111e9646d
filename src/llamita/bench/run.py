"""Measure a model, a baseline and the machine's limits in turn, each in its own process.

Clocks of shared machines swing by a third from minute to minute. So every repeat measures the model and the
baseline one after the other, with the limits before each; the limits come once more at the end.
"""

import datetime
import platform
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamita import __version__, _native
from llamita.bench.report import Limits, Runs, Settings, best_of, figures, fractions, mark_weak, ratios
from llamita.bench.work import Work
from llamita.bench.worker import ModelSpec, Worker
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError, RunError
from llamita.system.machine import cpu_name, free_memory, last_level_cache, usable_memory
from llamita.system.progress import Progress

PROBE_BYTES = 2**30  # many times any cache
_LOADS = 3  # how often a model is loaded that loads quickly; others once
_QUICK_LOAD = 3.0  # seconds
_WARM_UP_TOKENS = 2  # decoded together before anything is timed


@dataclass(frozen=True)
class Job:
    """What to measure. `threads` to `kv_dtype` and `float_math` are those of `load`."""

    model: ModelSpec
    baseline: ModelSpec | None
    settings: Settings
    repeats: int
    threads: int | None = None
    context: int | None = None
    kv_dtype: str | None = None
    probe_bytes: int = PROBE_BYTES
    float_math: str = FLOAT_MATHS[0]


@dataclass
class _Contender:
    """A model in its process, with the facts about it and its seconds so far."""

    role: str  # "model" or "baseline"
    worker: Worker
    facts: dict[str, Any]
    memory: dict[str, Any]
    runs: Runs


def run_bench(job: Job, progress: Progress = None) -> dict[str, Any]:
    """Measure, and return the result as JSON values; `docs/results/benchmarks.md` describes them.

    Raises:
        InputError: a model, an option or a size is at fault.
        RunError: there is too little memory.
    """
    specs = {"model": job.model} | ({"baseline": job.baseline} if job.baseline else {})
    total = len(specs) * (1 + 2 * job.repeats) + 1
    done = 0

    def report(what: str) -> None:
        nonlocal done
        if progress:
            progress(what, done, total)
        done += 1

    with ExitStack() as stack:
        probe = stack.enter_context(Worker("limits"))
        workers = {role: stack.enter_context(Worker(spec.name)) for role, spec in specs.items()}
        _check_needs(job, specs, workers)
        contenders = []
        for role, spec in specs.items():
            report(f"loading the {role}")
            contenders.append(_load(job, role, spec, workers[role]))
        probes = []
        for repeat in range(job.repeats):
            for contender in contenders:
                report("measuring the limits")
                probes.append(_probe(job, probe))
                report(f"{repeat + 1} of {job.repeats}: {contender.role}")
                _run(job, contender)
        report("measuring the limits")
        probes.append(_probe(job, probe))
    return _result(job, contenders, probes)


def _check_needs(job: Job, specs: dict[str, ModelSpec], workers: dict[str, Worker]) -> None:
    """Raise an error before anything is made if the context or the free memory is too small for the work."""
    needed, wanted = 0, job.settings.prompt_tokens + job.settings.new_tokens
    for role, spec in specs.items():
        needs = workers[role].ask("needs", spec=asdict(spec), context=job.context, kv_dtype=job.kv_dtype)
        needed += needs["memory_bytes"]
        if wanted > needs["context"]:
            raise InputError(
                spec.name,
                f"at most {needs['context']} tokens, the context",
                f"{wanted}",
                "try fewer --prompt-tokens or --new-tokens",
            )
    free = free_memory()
    if needed > free:
        hint = "a smaller shape, or without --baseline" if "baseline" in specs else "a smaller shape"
        raise RunError("memory", f"{needed / 1e9:.1f} GB free for the weights", f"{free / 1e9:.1f} GB", f"try {hint}")


def _load(job: Job, role: str, spec: ModelSpec, worker: Worker) -> _Contender:
    """Load a model, several times if that is quick, and warm it up; measure the memory with one sequence."""
    runs = Runs([], [], [], [], [])
    contender = _Contender(role, worker, {}, {}, runs)
    for _ in range(_LOADS):
        contender.facts = worker.ask(
            "load", spec=asdict(spec), threads=job.threads, context=job.context, kv_dtype=job.kv_dtype,
            float_math=job.float_math,
        )  # fmt: skip
        seconds = contender.facts["seconds"]
        if spec.scheme or not spec.is_random:
            runs.load.append(seconds)
        if seconds > _QUICK_LOAD:
            break
    _prefill(job, worker, watch=True)
    worker.ask("decode", tokens=job.settings.new_tokens, watch=True)
    contender.memory = worker.ask("memory")
    if job.settings.batch > 1:
        tokens = min(_WARM_UP_TOKENS, job.settings.new_tokens)
        worker.ask("decode", tokens=tokens, batch=job.settings.batch)
    return contender


def _run(job: Job, contender: _Contender) -> None:
    """Run one repeat: prefill, decode, and decode of several sequences together."""
    settings, runs, ask = job.settings, contender.runs, contender.worker.ask
    prefill = _prefill(job, contender.worker)
    runs.prefill.append(prefill["seconds"])
    runs.first_token.append(prefill["first_token_seconds"])
    runs.decode.append(ask("decode", tokens=settings.new_tokens)["seconds"])
    if settings.batch > 1:
        runs.batch.append(ask("decode", tokens=settings.new_tokens, batch=settings.batch)["seconds"])


def _prefill(job: Job, worker: Worker, watch: bool = False) -> dict[str, Any]:
    tokens = job.settings.prompt_tokens
    return worker.ask("prefill", tokens=tokens, capacity=tokens + job.settings.new_tokens, watch=watch)


def _probe(job: Job, worker: Worker) -> dict[str, Any]:
    return worker.ask("limits", threads=job.threads, probe_bytes=job.probe_bytes)


def _result(job: Job, contenders: list[_Contender], probes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything as JSON values."""
    rates = [Limits(probe["int8_rate"], probe["bandwidth"], last_level_cache()) for probe in probes]
    limits, vnni = best_of(rates), [probe["vnni_rate"] for probe in probes if probe["vnni_rate"]]
    specs = {"model": job.model, "baseline": job.baseline}
    models: dict[str, Any] = {"model": None, "baseline": None}
    weak: list[str] = []
    for i, contender in enumerate(contenders):
        facts, spec = contender.facts, specs[contender.role]
        assert spec
        before = range(i, len(probes) - 1, len(contenders))  # the number of the probe before each repeat
        nearby = [best_of(rates[k : k + 2]) for k in before]
        rows = fractions(
            Work(**facts["work"]), contender.runs, job.settings, nearby, limits, facts["scheme"] is not None
        )
        weak += mark_weak(spec.name, rows)
        models[contender.role] = {
            "name": spec.name,
            "is_random": spec.is_random,
            **{key: facts[key] for key in ("scheme", "kv_dtype", "float_math", "context", "size_bytes", "work")},
            **contender.memory,
            **figures(contender.runs, job.settings),
            "of_limit": rows,
        }
    baseline = models["baseline"]
    return {
        "llamita": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(contenders[0].facts),
        "settings": {**asdict(job.settings), "repeats": job.repeats},
        "limits": {**asdict(limits), "vnni_rate": max(vnni, default=None), "probes": probes, "too_weak": weak},
        **models,
        "ratios": ratios(models["model"], baseline) if baseline else None,
    }


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "isa": facts["isa"],
        "threads": facts["threads"],
        "usable_cpus": _native.usable_cpus(),
        "memory_bytes": usable_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
