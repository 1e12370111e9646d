"""From the fields of a request to the options of the engine."""

from collections.abc import Mapping
from typing import Any, cast

from llamita.engine.requests import Options
from llamita.serve.errors import wrong
from llamita.serve.fields import shown

_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "ignore_eos",
)
_SEEDS = 1 << 63
_MOST_BIASES = 1024


def engine_options(values: Mapping[str, Any], vocab_size: int) -> Options:
    """Return the options that chat and completions share, for the first choice.

    Raises:
        ApiError: `logit_bias` is not a map from token ids to numbers.
    """
    options = cast(Options, {name: values[name] for name in _SAME if name in values})
    if "repeat_penalty" in values:
        options.setdefault("repetition_penalty", values["repeat_penalty"])
    stop = values.get("stop", [])
    options["stop"] = tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s)
    if "seed" in values:
        options["seed"] = values["seed"] % _SEEDS
    if values.get("logit_bias"):
        options["logit_bias"] = _biases(values["logit_bias"], vocab_size)
    return options


def for_choice(options: Options, choice: int) -> Options:
    """Return the options of one of several choices: each draws with a seed of its own, and has its own grammar."""
    own = options.copy()
    seed, constraint = options.get("seed"), options.get("constraint")
    if seed is not None:
        own["seed"] = (seed + choice) % _SEEDS
    if constraint is not None:
        own["constraint"] = constraint.copy()
    return own


def _biases(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    if len(given) > _MOST_BIASES:
        raise wrong("logit_bias", f"expected at most {_MOST_BIASES} tokens, got {len(given)}.")
    biases = {}
    for name, value in given.items():
        is_token = name.isdecimal() and len(name) < 10 and int(name) < vocab_size
        is_bias = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        if not is_token or not is_bias:
            expected = f"token ids from 0 to {vocab_size - 1} with numbers from -100 to 100"
            raise wrong("logit_bias", f"expected {expected}, got {shown(name)}: {shown(value)}.")
        biases[int(name)] = float(value)
    return biases


def wants_usage(values: Mapping[str, Any]) -> bool:
    """Return whether a stream ends with the counts.

    Raises:
        ApiError: `stream_options` has no flag in it.
    """
    flag = values.get("stream_options", {}).get("include_usage")
    if flag is not None and not isinstance(flag, bool):
        raise wrong("stream_options.include_usage", f"expected true or false, got {shown(flag)}.")
    return bool(flag)
