"""Damage for fuzz tests: values of JSON changed in one place, texts broken, and a clock against hangs."""

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamita.errors import LlamitaError

MOST_SECONDS = 2  # of this process's time for one action; they take milliseconds
LONGEST_WAIT = 120  # seconds by the clock: for an action that waits, on a machine that is busy

WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 32, 33, 64, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32,
    2**53, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, -1.0, 1e-45, 1e308, 64.0, "", "x", "float32", "BF16",
    "I8", "../../etc/passwd", "a\nb", "\x1b[31m", "é", "\ud800", "a" * 5000, [], [0], [1, 2], [64, 64],
    [-1, 4], ["x"], [[]], {}, {"a": 1}, {"": None}, "model.safetensors", "config.json", ".", "..",
]  # fmt: skip


class Hang(BaseException):
    """Not an Exception, which the library might take for one of its own."""


@contextmanager
def alarm() -> Iterator[None]:
    """Turn a hang into a failure, whether the action computes or waits."""

    def ring(_signal: int, _frame: object) -> None:
        raise Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, MOST_SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, LONGEST_WAIT)}
    before = {number: signal.signal(number, ring) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(action: Callable[[Path], Any], path: Path) -> str | None:
    """Return the message with which the action refused, None if it did not."""
    with alarm():
        try:
            action(path)
        except LlamitaError as error:
            return str(error)
    return None


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change one place somewhere within a JSON value: replace, remove, add, rename, exchange or nudge."""
    value = copy.deepcopy(value)
    parents = list(_containers(value))
    parent = rng.choice(parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    if not keys:
        return rng.choice(WEIRD)
    key, action = rng.choice(keys), rng.randrange(7)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[str(rng.choice(WEIRD))] = parent[key]
    elif action == 2 and isinstance(parent, dict):
        parent[str(rng.choice(WEIRD))] = parent.pop(key)
    elif action == 3 and isinstance(parent[key], int | float):
        parent[key] += rng.choice([-1, 1, 8, -8, 2**32, parent[key]])
    elif action == 4:
        other = rng.choice(keys)
        parent[key], parent[other] = parent[other], parent[key]
    elif action == 5:
        parent[key] = copy.deepcopy(rng.choice(parents))
    else:
        parent[key] = rng.choice(WEIRD)
    return value


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def to_text(value: Any, rng: random.Random) -> bytes:
    """Return a value as JSON, now and then broken as text."""
    data = json.dumps(value).encode()
    kind = rng.randrange(12)
    if kind == 0 and data:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        return data.replace(b": 1", b": NaN").replace(b": 0", b": 1e999")
    if kind == 3:
        return b"[" * 3000 + data
    return data
