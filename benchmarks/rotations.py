"""Measure the time that rotations cost: steps with R4, with the head's transform, and without, in turn.

python benchmarks/rotations.py MODEL [--rounds N] [--threads N] [--prompt-tokens N]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np

import llamita
from llamita import _native
from llamita.engine.llm import LLM
from llamita.engine.model import Model
from llamita.engine.weights import down_rotation
from llamita.numerics.affine import f32_to_bf16


def variants(llm: LLM) -> dict[str, Model]:
    """Return the model as it is, and with each rotation added: outputs change, speed is that of a rotated model."""
    weights, hidden = llm.model.weights, llm.config.hidden_size
    plain = replace(weights, down_rotation=None, head_transform=None)
    dense = np.random.default_rng(0).standard_normal((hidden, hidden), np.float32) / np.float32(hidden)
    added = {
        "plain": plain,
        "R4": replace(plain, down_rotation=down_rotation(llm.config.intermediate_size)),
        "transform, bf16": replace(plain, head_transform=_native.wrap_float([f32_to_bf16(dense)])),
        "transform, f32": replace(plain, head_transform=_native.wrap_float([dense])),
    }
    return {name: Model(llm.config, changed) for name, changed in added.items()}


def time_in_turns(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each action in every round, without the first round, which allocates memory."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in actions if turn % 2 else reversed(actions):
            began = time.perf_counter()
            actions[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def stepper(llm: LLM, model: Model, prompt: np.ndarray, new: np.ndarray) -> Callable[[], object]:
    """Return an action that takes in `new` after the prompt, again and again."""
    cache = llm.new_sequence(len(prompt) + len(new))
    if len(prompt):
        model.step([(cache, prompt)])

    def act() -> None:
        model.step([(cache, new)])
        cache.length = len(prompt)

    return act


def main() -> None:
    """Print a Markdown table: medians, and the median of each round's difference to the plain model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--rounds", type=int, default=100, help="of single tokens; a twentieth of prompts")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    arguments = parser.parse_args()
    llm = llamita.load(arguments.model, threads=arguments.threads)
    ids = np.random.default_rng(1).integers(0, llm.config.vocab_size, arguments.prompt_tokens)
    prompt = ids.astype(np.int32)
    models = variants(llm)
    print("| step | variant | ms | % more than plain |\n|---|---|---|---|")
    kinds = {"one token": (prompt, prompt[:1], arguments.rounds)}
    kinds[f"{len(prompt)} tokens"] = (prompt[:0], prompt, max(arguments.rounds // 20, 3))
    for kind, (before, new, rounds) in kinds.items():
        steps = {name: stepper(llm, model, before, new) for name, model in models.items()}
        seconds = time_in_turns(steps, rounds)
        plain = np.array(seconds["plain"])
        for name, times in seconds.items():
            more = 100 * median(np.array(times) - plain) / median(plain)
            print(f"| {kind} | {name} | {1e3 * median(times):.3f} | {more:+.2f} |")


if __name__ == "__main__":
    main()
