"""Show results in a terminal or as JSON: parts that several commands print alike."""

import sys
from contextlib import closing
from dataclasses import asdict
from io import TextIOWrapper

from llamita.engine.llm import LLM
from llamita.engine.requests import Generation, Options, Prompt
from llamita.numerics.intervals import Interval
from llamita.text.printable import counted

_FEW_TOKENS = 1000  # with fewer, intervals say little


def show_stream(llm: LLM, prompt: Prompt, options: Options, shown: list[str]) -> Generation:
    """Write each piece of a generation to stdout as it comes, append it to `shown`, and return the generation."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    with closing(llm.stream(prompt, **options)) as stream:  # on Ctrl-C, closing stops the generation at once
        for piece in stream:
            if isinstance(piece, Generation):
                return piece
            shown.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    raise AssertionError("a stream ends with its generation")


def describe(generation: Generation) -> dict[str, object]:
    """Return a generation as JSON values."""
    timings = generation.timings
    rates = {"prefill_rate": timings.prefill_rate, "decode_rate": timings.decode_rate}
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "timings": {**asdict(timings), **rates},
    }


def summary(generation: Generation) -> str:
    """Return one line about how a generation ended and how fast it was."""
    t = generation.timings
    reused = f" ({t.reused_tokens} reused)" if t.reused_tokens else ""
    drafts = f" ({t.accepted_tokens} of {t.drafted_tokens} drafted right)" if t.drafted_tokens else ""
    return (
        f"[{generation.finish_reason}] prompt {counted(t.prompt_tokens, 'token')}{reused} "
        f"at {t.prefill_rate:,.0f} tok/s, first token after {t.first_token_seconds:.3f} s, "
        f"{counted(t.generated_tokens, 'token')}{drafts} at {t.decode_rate:,.1f} tok/s"
    )


def scored(text_name: str, tokens: int) -> str:
    """Return one line about the text that models were scored on."""
    few = "" if tokens >= _FEW_TOKENS else "; few tokens: the figures mean little"
    return f"{text_name}: {tokens:,} tokens predicted; intervals: 95 %, block bootstrap{few}"


def interval_rows(label: str, intervals: list[Interval | None], factor: int, spec: str, unit: str) -> list[list[str]]:
    """Return two rows of a table: the values, and the bounds of their intervals under them."""
    values = [f"{i.value * factor:{spec}}{unit}" if i else "" for i in intervals]
    bounds = [f"{i.low * factor:{spec}} to {i.high * factor:{spec}}" if i else "" for i in intervals]
    return [[label, *values], ["", *(bound.replace(" ", "\xa0") for bound in bounds)]]
