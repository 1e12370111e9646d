"""Run llamita as a contender, and measure the machine's limits with its probes."""

import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import records

import llamita
from llamita import _native
from llamita.bench.plan import describe
from llamita.bench.tiles import vnni_rate
from llamita.bench.work import count_work
from llamita.engine.llm import PREFILL_CHUNK

PROBES = 3  # of each limit, every time
PROBE_BYTES = 512 * 2**20  # far above any cache


class Llamita:
    """Drives the forward pass itself, as `llamita bench` does."""

    def __init__(self, options: dict[str, Any]) -> None:
        chosen = {name: options[name] for name in ("kv_dtype", "float_math") if name in options}
        self.llm = llamita.load(options["model"], threads=options["threads"], **chosen)
        self.model = options["model"]
        self.sequences: list[Any] = []

    @property
    def about(self) -> dict[str, Any]:
        """Return the work; it is counted on request, so that it is no part of the load."""
        model = describe(self.model)
        work = count_work(model.config, model.scheme, self.llm.kv_dtype, model.float_dtype)
        return {
            "version": f"llamita {llamita.__version__}, sources {digest_of_sources()}",
            "settings": {
                "threads": _native.threads(),
                "isa": _native.isa(),
                "kv_dtype": self.llm.kv_dtype,
                "float_math": self.llm.float_math,
            },
            "work": records.recorded(work, int8=model.scheme is not None),
        }

    def run(self, prompts: list[np.ndarray], new: int) -> protocol.Run:
        return protocol.run_stepwise(lambda: self._start(prompts, new), self._step, new)

    def _start(self, prompts: list[np.ndarray], new: int) -> list[int]:
        self.sequences = [self.llm.new_sequence(len(prompt) + new) for prompt in prompts]
        return [int(self._prefill(s, p)[0].argmax()) for s, p in zip(self.sequences, prompts, strict=True)]

    def _prefill(self, sequence: Any, prompt: np.ndarray) -> np.ndarray:
        """Return logits (1, vocab) after the prompt."""
        last = (len(prompt) - 1) // PREFILL_CHUNK * PREFILL_CHUNK
        for at in range(0, last, PREFILL_CHUNK):
            self.llm.model.step([(sequence, prompt[at : at + PREFILL_CHUNK])], np.arange(0))
        return self.llm.model.step([(sequence, prompt[last:])])

    def _step(self, tokens: list[int]) -> list[int]:
        ids = np.array(tokens, dtype=np.int32)
        batch = [(sequence, ids[i : i + 1]) for i, sequence in enumerate(self.sequences)]
        return self.llm.model.step(batch).argmax(axis=1).tolist()

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        return self._prefill(self.llm.new_sequence(len(prompt)), prompt)[0].copy()


class Limits:
    """Measures the machine's limits at this moment, without a model."""

    def __init__(self, options: dict[str, Any]) -> None:
        _native.set_threads(options["threads"])
        self.about = {"version": f"llamita {llamita.__version__}", "settings": {"isa": _native.isa()}}

    def measure(self) -> dict[str, float]:
        """Return 10^9 int8 multiply-adds and 10^9 bytes per second; medians, because one probe may meet a burst."""
        rates = {
            "int8_rate": statistics.median(_native.int8_rate() for _ in range(PROBES)),
            "read_bandwidth": statistics.median(_native.read_bandwidth(PROBE_BYTES) for _ in range(PROBES)),
        }
        if vnni := vnni_rate():
            rates["vnni_rate"] = vnni / 1e9
        return rates


def serve_limits() -> None:
    """Answer every line with the limits."""
    protocol.die_with_parent()
    limits = Limits(json.loads(sys.argv[1]))
    print(json.dumps(limits.about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(limits.measure()), flush=True)


def digest_of_sources() -> str:
    """Return a hash of the package's Python and of the native module, which names what ran."""
    folder = Path(llamita.__file__).parent
    files = sorted([*folder.rglob("*.py"), *folder.glob("_native*.so")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    if json.loads(sys.argv[1]).get("limits"):
        serve_limits()
    else:
        protocol.serve(Llamita)
