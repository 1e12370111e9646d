"""Run a `.pte` file in ExecuTorch's own runtime: its logits, its greedy continuation.

This file is also a program, `python -m llamita.export.runtime PTE ASKED GIVEN`: the runtime writes to stderr as it
likes, and ends its process where a program is damaged.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import RunError

_LINES = 3  # of the runtime's stderr in an error


@dataclass(frozen=True)
class Ran:
    """The results of a program.

    Attributes:
        logits: float32 (tokens, vocab), from passes of one token.
        prefill: float32 (2, vocab): the last two of these, from one pass over all tokens but one on empty caches, and
            from the last token behind it; None where there was no such pass.
        greedy: int64 (n,): the likeliest tokens after the prompt.
        seconds: of a pass of one token, the median.
    """

    logits: np.ndarray
    prefill: np.ndarray | None
    greedy: np.ndarray
    seconds: float


def run(pte: Path, tokens: Sequence[int], prompt: int, new: int) -> Ran:
    """Run a program in another process.

    Args:
        tokens: whose logits are asked.
        prompt: how many of them are the prompt of the greedy continuation.
        new: tokens of the continuation.

    Raises:
        RunError: the runtime refused the program; the message has its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, given = Path(folder) / "asked.npz", Path(folder) / "given.npz"
        np.savez(asked, tokens=np.array(tokens, np.int64), prompt=prompt, new=new)
        # -P: without it, a numpy.py in the user's directory, which may have come with a model, would be run
        command = [sys.executable, "-P", "-m", "llamita.export.runtime", str(pte), str(asked), str(given)]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        if ran.returncode or not given.exists():
            said = " ".join(" ".join(ran.stderr.strip().splitlines()[-_LINES:]).split())
            got = f"exit code {ran.returncode}: {said[-400:]}"
            raise RunError(pte.name, "ExecuTorch's runtime to run it", got)
        with np.load(given) as found:
            return Ran(found["logits"], found["prefill"], found["greedy"], float(found["seconds"]))


def _main(pte: str, asked: str, given: str) -> None:
    with np.load(asked) as values:
        tokens, prompt, new = values["tokens"], int(values["prompt"]), int(values["new"])
    forward, rows, times = _load(Path(pte)), [], []
    for place, token in enumerate(tokens):
        began = time.perf_counter()
        rows.append(forward([token], place))
        times.append(time.perf_counter() - began)
    forward = _load(Path(pte))  # empty caches show what a pass of many tokens does not write
    prefill = [forward(tokens[:-1], 0), forward(tokens[-1:], len(tokens) - 1)]
    forward = _load(Path(pte))
    row, greedy = forward(tokens[:prompt], 0), list[int]()
    for place in range(prompt, prompt + new):
        greedy.append(int(row.argmax()))
        row = forward(greedy[-1:], place)
    np.savez(given, logits=np.stack(rows), prefill=np.stack(prefill), greedy=np.array(greedy, np.int64),
             seconds=float(np.median(times)))  # fmt: skip


def _load(pte: Path) -> Any:
    """Return a program's forward(tokens, position) with empty caches, which gives float32 (vocab,)."""
    import executorch.kernels.quantized  # noqa: F401  registers operators
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers operators, too
    from executorch.runtime import Runtime, Verification

    program: Any = Runtime.get().load_program(pte, verification=Verification.Minimal)
    method = program.load_method("forward")

    def forward(tokens: Any, position: int) -> np.ndarray:
        inputs = [torch.tensor([[int(token) for token in tokens]]), torch.tensor([position])]
        return method.execute(inputs)[0][0].numpy().copy()

    return forward


if __name__ == "__main__":
    _main(*sys.argv[1:])
