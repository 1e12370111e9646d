"""What HTTP costs: the server beside the library in this process, with the same requests, in turn."""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from http_streams import Reply, completion
from server_bench import CHAT, Bench, Record, rate, run
from server_processes import Server

from llamita.engine.requests import Generation

MORE_ROUNDS = 3  # times as many as elsewhere: the memory of a shared machine is faster or slower for seconds at a time
STREAMS = 8  # of the comparison with generate_many
SHORT = 1024  # tokens of a context, for models that have no more
TOGETHER = 8  # clients whose answers are compared with those of one
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos", "max_tokens")


def overhead(bench: Bench) -> Iterator[Record]:
    """Compare one stream of the server with one of the library."""
    new, rounds = 2 * bench.sizes.new, MORE_ROUNDS * bench.sizes.rounds
    with bench.serving(bench.kind()) as server:
        figures: dict[str, list[float]] = {}
        for round_ in range(rounds):
            body = completion(bench.prompt(bench.sizes.lengths[0], f"overhead {round_}"), new, round_)
            of_engine, of_server = _in_turn(round_, lambda b=body: _engine(bench, b), lambda b=body: _one(server, b))
            (reply,) = of_server
            rows = {
                "rate": rate(reply) / of_engine["rate"],
                "first_ms": 1000 * (reply.first_seconds - of_engine["first"]),
                "http_first_ms": 1000 * reply.first_seconds - reply.timings["first_token_ms"],
                "engine_tokens_per_second": of_engine["rate"],
                "server_tokens_per_second": rate(reply),
            }
            for name, value in rows.items():
                figures.setdefault(name, []).append(value)
    medians = {name: round(statistics.median(values), 4) for name, values in figures.items()}
    yield {"case": "overhead", "new_tokens": new, "rounds": rounds, **medians,
           "rates": [round(r, 4) for r in figures["rate"]]}  # fmt: skip


def _in_turn(round_: int, *actions: Callable[[], Any]) -> list[Any]:
    """Run actions, every second time in reverse, so that none is always the first; return their results in order."""
    order = list(enumerate(actions))
    done = {place: action() for place, action in (order if round_ % 2 == 0 else order[::-1])}
    return [done[place] for place in range(len(actions))]


def options_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return the library's options of a completion's body."""
    return {name: body[name] for name in _SAMPLING if name in body}


def _engine(bench: Bench, body: dict[str, Any]) -> dict[str, float]:
    began, times, tokens = time.perf_counter(), [], 0
    for piece in bench.llm.stream(body["prompt"], **options_of(body)):
        if isinstance(piece, Generation):
            tokens = piece.timings.generated_tokens
        else:
            times.append(time.perf_counter())
    return {"first": times[0] - began, "rate": (tokens - 1) / max(times[-1] - times[0], 1e-9)}


def _one(server: Server, body: dict[str, Any]) -> list[Reply]:
    return run([(server, body)], 1)


def many(bench: Bench) -> Iterator[Record]:
    """Compare eight streams of the server with `generate_many`."""
    new, rounds, ratios, rates = 2 * bench.sizes.new, MORE_ROUNDS * bench.sizes.rounds, [], []
    with bench.serving(bench.kind()) as server:
        for round_ in range(rounds):
            prompts = [bench.prompt(bench.sizes.lengths[0], f"many {round_} {i}") for i in range(STREAMS)]
            bodies = [completion(ids, new, round_) for ids in prompts]
            alone, (replies, seconds) = _in_turn(
                round_, lambda b=bodies: _many(bench, b), lambda b=bodies: _timed(server, b)
            )
            generations, engine_seconds = alone
            assert [g.text for g in generations] == [r.text for r in replies], "the server's answers differ"
            ratios.append(engine_seconds / seconds)
            rates.append((STREAMS * new / engine_seconds, STREAMS * new / seconds))
    engine, served = (statistics.median(values) for values in zip(*rates, strict=True))
    yield {"case": "many", "streams": STREAMS, "new_tokens": new, "rounds": rounds,
           "rate": round(statistics.median(ratios), 4), "rates": [round(r, 4) for r in ratios],
           "engine_tokens_per_second": round(engine, 2), "server_tokens_per_second": round(served, 2)}  # fmt: skip


def _many(bench: Bench, bodies: list[dict[str, Any]]) -> tuple[list[Generation], float]:
    began = time.perf_counter()
    generations = bench.llm.generate_many([body["prompt"] for body in bodies], **options_of(bodies[0]))
    return generations, time.perf_counter() - began


def _timed(server: Server, bodies: list[dict[str, Any]]) -> tuple[list[Reply], float]:
    replies = run([(server, body) for body in bodies], len(bodies))
    return replies, max(r.ended for r in replies) - min(r.started for r in replies)


def equality(bench: Bench) -> Iterator[Record]:
    """Compare answers in company with those of the same requests alone: text, tokens and their log-probabilities."""
    source, equal = random.Random("equality"), {True: 0, False: 0}
    bodies = []
    for i in range(bench.sizes.alone):
        ids = bench.prompt(source.randint(bench.sizes.lengths[0] // 2, bench.sizes.lengths[0] * 4), f"equality {i}")
        drawn = {"temperature": 0.0} if i % 2 else {}
        bodies.append(completion(ids, bench.sizes.new, i, logprobs=2) | drawn)
    with bench.serving(bench.kind()) as server:
        together = run([(server, body) for body in bodies], TOGETHER)
    with bench.serving(bench.kind()) as server:  # another one, which keeps none of the first one's prompts
        alone = run([(server, body) for body in bodies], 1)
    for body, one, other in zip(bodies, together, alone, strict=True):
        equal[body["temperature"] == 0] += _said(one) == _said(other) and one.tokens > 0
    yield {"case": "equality", "clients": TOGETHER, "requests": len(bodies), "equal_greedy": equal[True],
           "equal_seeded": equal[False], "equal": sum(equal.values())}  # fmt: skip


def _said(reply: Reply) -> tuple[str, list[Any]]:
    """Return the text, and every token with its numbers; several can come in one event."""
    scores = [c["logprobs"] for _, event in reply.events for c in event["choices"] if c.get("logprobs")]
    names = ("tokens", "token_logprobs", "top_logprobs")
    return reply.text, [[value for s in scores for value in s[name]] for name in names]


def structured(bench: Bench) -> Iterator[Record]:
    """Compare answers that a schema binds with free ones of as many tokens."""
    for model in filter(None, (bench.model, bench.worded)):
        with bench.serving(bench.kind(model=model, context=SHORT)) as server:
            yield {"case": "structured", "model": server.model()["id"], **_structured(bench, server)}


def _structured(bench: Bench, server: Server) -> Record:
    costs, later, firsts, tokens, valid = [], [], [], 0, 0
    for i in range(-1, bench.sizes.schemas):
        message = {"role": "user", "content": f"Describe person number {i} as JSON."}
        common = {"messages": [message], "max_tokens": 400, "seed": max(i, 0), "temperature": 0.8, "stream": True,
                  "stream_options": {"include_usage": True}}  # fmt: skip
        schema = {"name": "person", "strict": True, "schema": person(i)}
        bound = {**common, "response_format": {"type": "json_schema", "json_schema": schema}}
        (one,) = run([(server, bound)], 1, CHAT)
        (free,) = run([(server, {**common, "ignore_eos": True, "max_tokens": one.tokens})], 1, CHAT)
        if i < 0:  # the first warms up
            continue
        costs.append((one.ended - one.started) / (free.ended - free.started) - 1)
        later.append((one.texts[-1][0] - one.texts[0][0]) / (free.texts[-1][0] - free.texts[0][0]) - 1)
        firsts.append(1000 * (one.first_seconds - free.first_seconds))
        tokens += one.tokens
        valid += set(json.loads(one.text)) == set(schema["schema"]["required"])
    return {"schemas": len(costs), "valid": valid, "tokens": tokens, "cost": round(statistics.median(costs), 4),
            "cost_after_first": round(statistics.median(later), 4),
            "first_ms": round(statistics.median(firsts), 1), "costs": [round(c, 3) for c in costs]}  # fmt: skip


def person(number: int) -> dict[str, Any]:
    """Return a schema such as programs ask for, different for each number."""
    properties = {
        "name": {"type": "string", "minLength": 3, "maxLength": 20 + number},
        "age": {"type": "integer", "minimum": 0, "maximum": 120 + number},
        "job": {"enum": ["baker", "nurse", "pilot", "teacher"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 2, "maxItems": 3},
        "note": {"type": "string", "minLength": 20, "maxLength": 60},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
