"""Counts and times of an answer, in OpenAI's form and, for times, llama.cpp's."""

from collections.abc import Sequence
from typing import Any

from llamita.engine.requests import Generation


def usage(generations: Sequence[Generation], choices: int) -> dict[str, Any]:
    """Return the token counts of all answers; a prompt with several choices counts once.

    Args:
        generations: all choices of the first prompt first.
        choices: how many for each prompt.
    """
    firsts = [generation.timings for generation in generations[::choices]]
    timings = [generation.timings for generation in generations]
    prompt = sum(t.prompt_tokens for t in firsts)
    completion = sum(t.generated_tokens for t in timings)
    accepted = sum(t.accepted_tokens for t in timings)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(t.reused_tokens for t in firsts)},
        "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": 0},
    }


def timings(generation: Generation) -> dict[str, Any]:
    """Return the times of an answer, with the names of llama.cpp's server where it has them."""
    t = generation.timings
    return {
        "cache_n": t.reused_tokens,
        "prompt_n": t.prompt_tokens - t.reused_tokens,
        "prompt_ms": round(1000 * t.prefill_seconds, 3),
        "prompt_per_second": round(t.prefill_rate, 2),
        "predicted_n": t.generated_tokens,
        "predicted_ms": round(1000 * t.decode_seconds, 3),
        "predicted_per_second": round(t.decode_rate, 2),
        "queue_ms": round(1000 * t.queue_seconds, 3),
        "first_token_ms": round(1000 * t.first_token_seconds, 3),
        "draft_n": t.drafted_tokens,
        "draft_n_accepted": t.accepted_tokens,
    }
