"""Show the newest record of each case as text, with the bars that were set for it."""

from collections.abc import Callable, Sequence
from typing import Any

Line = dict[str, Any]
_KEYS = ("case", "model", "server", "clients", "server_state", "request", "settings")  # what tells records apart


def report(lines: Sequence[Line]) -> str:
    """Return the tables of the newest lines."""
    newest = {tuple(str(line.get(key, "")) for key in _KEYS): line for line in lines}
    texts = []
    for case in dict.fromkeys(line["case"] for line in newest.values()):
        found = [line for line in newest.values() if line["case"] == case]
        texts.append(_TABLES[case](found))
    return "\n\n".join(texts)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([f"{title}\n", *lines])


def _ms(figures: Line, *names: str) -> str:
    """Return some of the quantiles: `12 / 30 ms`."""
    return " / ".join(f"{figures.get(f'{name}_ms', '-')}" for name in names) + " ms"


def _load(lines: Sequence[Line]) -> str:
    heads = ("clients", "server", "tok/s", "first token, median / p95", "gap, median / p95 / p99", "failures",
             "cores of client", "MB")  # fmt: skip
    rows = [
        (line["clients"], line["server"], line["tokens_per_second"], _ms(line["first_token"], "median", "p95"),
         _ms(line["gap"], "median", "p95", "p99"), line["failures"], line["client_cores"], line["resident_megabytes"])
        for line in sorted(lines, key=lambda line: line["clients"])
    ]  # fmt: skip
    return _table("Load", heads, rows)


def _tune(lines: Sequence[Line]) -> str:
    rows = [(line["tokens_per_second"], f"`{line['settings']}`") for line in lines]
    return _table("Settings of llama-server, by a load of 4 clients", ("tok/s", "settings"), rows)


def _overhead(lines: Sequence[Line]) -> str:
    heads = ("of the library's tok/s (bar 97 %)", "server", "library", "first token later by (bar 5 ms)",
             "than in the engine itself by")  # fmt: skip
    return _table("One stream", heads, [
        (f"{line['rate']:.1%}", round(line["server_tokens_per_second"], 1), round(line["engine_tokens_per_second"], 1),
         f"{line['first_ms']:.1f} ms", f"{line['http_first_ms']:.1f} ms") for line in lines
    ])  # fmt: skip


def _many(lines: Sequence[Line]) -> str:
    heads = ("of generate_many's tok/s (bar 95 %)", "server", "generate_many")
    rows = [(f"{x['rate']:.1%}", x["server_tokens_per_second"], x["engine_tokens_per_second"]) for x in lines]
    return _table("Eight streams", heads, rows)


def _equality(lines: Sequence[Line]) -> str:
    rows = [(f"{line['equal']} of {line['requests']}", line["equal_greedy"], line["equal_seeded"]) for line in lines]
    return _table("Answers equal to those alone (bar: all)", ("equal", "greedy", "seeded"), rows)


def _structured(lines: Sequence[Line]) -> str:
    heads = ("model", "valid", "cost in time (bar 10 %)", "after the first token", "first token later by")
    return _table("Structured output", heads, [
        (x["model"], f"{x['valid']} of {x['schemas']}", f"{x['cost']:+.1%}", f"{x['cost_after_first']:+.1%}",
         f"{x['first_ms']} ms") for x in lines
    ])  # fmt: skip


def _long_prompt(lines: Sequence[Line]) -> str:
    heads = ("server", "prompt", "seconds", "gap before, median", "gap beside, median / p99 / most (bar: p99 250 ms)",
             "a new chat's first token, median / most (bar 1500 ms)")  # fmt: skip
    return _table("A long prompt of another client", heads, [
        (x["server"], x["prompt_tokens"], x["seconds"], _ms(x["solo_gap"], "median"),
         _ms(x["gap"], "median", "p99", "most"), _ms(x["chat_first"], "median", "most")) for x in lines
    ])  # fmt: skip


def _second_turn(lines: Sequence[Line]) -> str:
    heads = ("first turn", "cached (bar 99 %)", "first token, median / most (bar 300 ms)")
    rows = [(x["prompt_tokens"], f"{x['cached_share']:.2%}", _ms(x["first"], "median", "most")) for x in lines]
    return _table("Second turn", heads, rows)


def _restart(lines: Sequence[Line]) -> str:
    heads = ("prompt", "first token before", "after (bar 2000 ms)", "cached", "equal", "file MB", "stop s", "start s",
             "start without file s")  # fmt: skip
    return _table("Restart", heads, [
        (x["prompt_tokens"], _ms(x["first_before"], "most"), _ms(x["first"], "most"), x["cached_tokens"], x["equal"],
         x["file_megabytes"], x["stop_seconds"], x["start_seconds"], x["plain_start_seconds"]) for x in lines
    ])  # fmt: skip


def _disconnects(lines: Sequence[Line]) -> str:
    heads = ("freed", "free after, median / p99 / most", "after the step's end (bar 50 ms), median / p99 / most")
    return _table("Clients that go away", heads, [
        (f"{x['freed']} of {x['clients']}", _ms(x["free_after"], "median", "p99", "most"),
         _ms(x["free_after_step"], "median", "p99", "most")) for x in lines
    ])  # fmt: skip


def _refusals(lines: Sequence[Line]) -> str:
    heads = ("server", "request", "status", "right", "answer, median / p95 / most (bar 20 ms)")
    return _table("Refusals", heads, [
        (x["server_state"], x["request"], x["status"], f"{x['right']} of {x['answer']['count']}",
         _ms(x["answer"], "median", "p95", "most")) for x in lines
    ])  # fmt: skip


def _goodput(lines: Sequence[Line]) -> str:
    heads = ("clients", "tok/s", "of the peak (bar 95 %)", "answers", "refused", "failures", "refusal, median / p95")
    return _table("Goodput", heads, [
        (x["clients"], x["tokens_per_second"], f"{x['of_peak']:.1%}", x["answers"], x["refused"], x["failures"],
         _ms(x["refusal"], "median", "p95")) for x in lines
    ])  # fmt: skip


_TABLES: dict[str, Callable[[Sequence[Line]], str]] = {
    "tune": _tune, "load": _load, "overhead": _overhead, "many": _many, "equality": _equality,
    "structured": _structured, "long_prompt": _long_prompt, "second_turn": _second_turn, "restart": _restart,
    "disconnects": _disconnects,
    "refusals": _refusals, "goodput": _goodput,
}  # fmt: skip
