"""Serve one model, or the probes, from a separate process that answers requests over its pipes.

A request is a line of JSON, {"do": "prefill", "tokens": 512}, and so is its answer, {"seconds": …}, or
{"error": …, "exit_code": …}. Requests name a function of `_State`: "limits", "needs", "load", "prefill", "decode"
or "memory"; its arguments are the request's other keys. The process ends with its parent.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llamita import _native
from llamita.bench.plan import describe
from llamita.bench.random_weights import RandomSource
from llamita.bench.shapes import find_shape
from llamita.bench.speed import decode, prefill
from llamita.bench.tiles import vnni_rate
from llamita.bench.work import Work, count_work
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.llm import LLM, check_cache
from llamita.engine.weights import FLOAT_MATHS, Linear
from llamita.errors import InputError, LlamitaError, RunError
from llamita.imports.open import open_source, resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.packed import PackedModel
from llamita.models.sizes import float_bytes, make_plan
from llamita.models.weights import ModelSource, transform_dtype
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.rounded import RoundedSource
from llamita.system.machine import MemoryWatch, free_memory
from llamita.system.threads import use_threads

_FLOAT_WIDTH = {"f32": 4, "f16": 2, "bf16": 2}
_READ_BYTES = 2**24  # of a file at a time
_WATCH_INTERVAL = 1.0  # seconds between checks that the parent lives
REQUESTS = ("limits", "needs", "load", "prefill", "decode", "memory")


@dataclass(frozen=True)
class ModelSpec:
    """The model to load.

    Attributes:
        source: a directory, hub name or "embedded"; None for a shape.
        shape: the name of a published shape; None for a source.
        scheme: round a float source, or make random weights, by this scheme; None for the source as it is,
            or for random bf16 weights.
        random: use the source's shape with random weights.
    """

    source: str | None
    shape: str | None
    scheme: QuantScheme | None = None
    random: bool = False

    @property
    def name(self) -> str:
        """The model's name in tables: the last part of its path, and its scheme."""
        place = self.shape or Path(self.source or "").name or str(self.source)
        if self.scheme is None:
            return f"{place} BF16" if self.is_random else place
        return f"{place} {self.scheme.name}"

    @property
    def is_random(self) -> bool:
        """True if the weights are random."""
        return self.random or self.shape is not None


class Worker:
    """The parent's end: start the process, send requests, and end it."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, "-P", "-m", "llamita.bench.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request, and return its answer.

        Raises:
            InputError, RunError: the worker raised this, or it ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunError(self.name, f"its process to answer, it ended with {how}", hint="is there enough memory?")
        answer = json.loads(line)
        if "error" in answer:
            raise (InputError if answer["exit_code"] == InputError.exit_code else RunError)(answer["error"])
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()  # killing it loses nothing
        self._process.communicate()


class _State:
    """The worker's end: the model, its sequences, and the memory that it takes."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._work: Work | None = None
        self._sequences: list[SequenceCache] = []
        self._capacity = 0
        self._mapped_bytes = 0
        self._touched = 0  # most tokens that were in all caches together
        self._watch = MemoryWatch()

    def limits(self, threads: int | None, probe_bytes: int) -> dict[str, Any]:
        """Measure the rates of this moment, with a probe too small to push a small machine into swapping."""
        use_threads(threads)
        probe_bytes = min(probe_bytes, free_memory() // 4)
        return {"int8_rate": _native.int8_rate() * 1e9, "vnni_rate": vnni_rate(),
                "bandwidth": _native.read_bandwidth(probe_bytes) * 1e9,
                "probe_bytes": probe_bytes}  # fmt: skip

    def needs(self, spec: dict[str, Any], context: int | None, kv_dtype: str | None) -> dict[str, Any]:
        """Return the bytes of memory that a model will take outside of files, and the tokens of its context."""
        wanted = _spec(spec)
        source = _open(wanted)
        context, _ = check_cache(source, context, kv_dtype)
        _, in_memory = _size(source, _float_dtype(wanted))
        source.close()
        return {"memory_bytes": in_memory, "context": context}

    def load(
        self,
        spec: dict[str, Any],
        threads: int | None,
        context: int | None,
        kv_dtype: str | None,
        float_math: str = FLOAT_MATHS[0],
    ) -> dict[str, Any]:
        """Load the model in place of the one before; return the seconds, with warm files, and facts about it."""
        self._llm, self._sequences = None, []
        gc.collect()
        wanted = _spec(spec)
        threads = use_threads(threads)
        float_dtype = _float_dtype(wanted)
        _warm(wanted)
        with self._watch, _undisturbed():
            began = time.perf_counter()
            source = _open(wanted)
            size, _ = _size(source, float_dtype)
            self._llm = LLM(source, context=context, kv_dtype=kv_dtype, float_math=float_math)
            seconds = time.perf_counter() - began
        made = source.made_bytes() if isinstance(source, Checkpoint) else 0
        self._mapped_bytes = 0 if isinstance(source, RandomSource) else _weight_bytes(self._llm)[1] - made
        keys, transform = self._llm.kv_dtype, transform_dtype(source.rotations)
        self._work = count_work(source.config, source.scheme, keys, float_dtype, transform)
        return {"seconds": seconds, "size_bytes": size, "threads": threads, "isa": _native.isa(),
                "scheme": source.scheme.to_dict() if source.scheme else None, "context": self._llm.context,
                "kv_dtype": self._llm.kv_dtype, "float_math": self._llm.float_math,
                "work": asdict(self._work)}  # fmt: skip

    def prefill(self, tokens: int, capacity: int, watch: bool = False) -> dict[str, Any]:
        """Run a prompt in a new sequence, which may grow to `capacity` and replaces the one before."""
        assert self._llm
        self._sequences[:1], self._capacity = [self._llm.new_sequence(capacity)], capacity
        with self._watch if watch else _undisturbed():
            seconds, first = prefill(self._llm, self._sequences[0], tokens)
        return {"seconds": seconds, "first_token_seconds": first}

    def decode(self, tokens: int, batch: int = 1, watch: bool = False) -> dict[str, Any]:
        """Decode after the prompt, over `batch` sequences with the same prompt, which are kept for later."""
        assert self._llm
        while len(self._sequences) < batch:
            self._sequences.append(self._llm.new_sequence(self._capacity))
            prefill(self._llm, self._sequences[-1], self._sequences[0].length)
        sequences = self._sequences[:batch]
        self._touched = max(self._touched, sum(sequence.length + tokens for sequence in sequences))
        with self._watch if watch else _undisturbed():
            return {"seconds": decode(self._llm, sequences, tokens)}

    def memory(self) -> dict[str, Any]:
        """Return the peak bytes of this process, with the pages of mapped files only for weights, and its parts."""
        assert self._llm
        assert self._work
        self._watch.look()
        own, in_place = _weight_bytes(self._llm)
        cache = self._touched * self._work.cache_bytes
        return {"memory_bytes": self._watch.peak + self._mapped_bytes, "weights_bytes": own + in_place,
                "cache_bytes": cache}  # fmt: skip


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep garbage collection off while something is timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _spec(values: dict[str, Any]) -> ModelSpec:
    """Return the spec in the JSON values of a request."""
    scheme = QuantScheme.from_dict(values["scheme"]) if values["scheme"] else None
    return ModelSpec(**{**values, "scheme": scheme})


def _float_dtype(spec: ModelSpec) -> Callable[[str], str]:
    """Return the dtypes of a model's float tensors, as a function of their names."""
    if spec.source is None or spec.random:
        return lambda _name: "BF16"
    return describe(str(resolve(spec.source))).float_dtype


def _warm(spec: ModelSpec) -> None:
    """Read a model's files once, so that loading does not wait for a disk."""
    if spec.source is None or spec.random:
        return
    source = open_source(spec.source)
    assert isinstance(source, Checkpoint | PackedModel)
    source.close()
    for file in source.files.values():
        with file.path.open("rb", buffering=0) as stream:
            while stream.read(_READ_BYTES):
                pass


def _open(spec: ModelSpec) -> ModelSource:
    if spec.shape is not None:
        name, config = find_shape(spec.shape)
        return RandomSource(ModelConfig.from_hf(config), spec.scheme, name)
    assert spec.source is not None
    source = open_source(spec.source)
    if spec.random:
        return RandomSource(source.config, spec.scheme, str(source.path))
    if spec.scheme is None:
        return source
    if not isinstance(source, Checkpoint):
        raise InputError("--scheme", "a float model", f"{spec.source}, which is quantized")
    return RoundedSource(source, spec.scheme)


def _size(source: ModelSource, float_dtype: Callable[[str], str]) -> tuple[int, int]:
    """Return the bytes of a model's weight files, written or not, and of the memory that no file backs."""
    if isinstance(source, RandomSource | RoundedSource):
        plan = make_plan(source.config, source.scheme, float_dtype) if source.scheme else None
        size = plan.file_bytes if plan else float_bytes(source.config, float_dtype)
        return size, size
    assert isinstance(source, Checkpoint | PackedModel)
    size = sum(file.path.stat().st_size for file in source.files.values())
    return size, source.made_bytes() if isinstance(source, Checkpoint) else size


def _weight_bytes(llm: LLM) -> tuple[int, int]:
    """Return the bytes of packed weights, in their own memory, and of float weights, used in place."""
    weights = llm.model.weights
    linears: list[Linear] = [weights.head]
    for block in weights.blocks:
        linears += [block.qkv, block.attention_out, block.gate_up, block.down]
    found = {id(w): w for w in [weights.embedding, *(p.weights for x in linears for p in x.parts)]}
    if weights.head_transform is not None:
        found[id(weights.head_transform)] = weights.head_transform
    own = sum(w.nbytes for w in found.values())
    in_place = sum(w.rows * w.columns * _FLOAT_WIDTH.get(w.kind, 0) for w in found.values())
    return own, in_place


def _end_with_parent() -> None:
    """End at once when the parent is gone, not only after the current request."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer every request; answer an error with its text."""
    state = _State()
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        assert do in REQUESTS
        try:
            answer = getattr(state, do)(**request)
        except LlamitaError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except MemoryError:
            answer = {"error": "memory: this machine has too little for the model", "exit_code": 1}
        except OSError as error:
            answer = {"error": f"{error.filename or 'input'}: {error.strerror or error}", "exit_code": 1}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    _end_with_parent()
    own_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else that is printed may look like an answer
    serve(sys.stdin, own_answers)
