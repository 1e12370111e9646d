"""Requests and their answers: options, checks, text, timings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict

import numpy as np

from llamita.engine.adapters import Adapter
from llamita.engine.constraint import Constraint
from llamita.engine.logprobs import TokenLogprob
from llamita.engine.sampler import Rules, Sampling
from llamita.engine.stops import StopStrings
from llamita.errors import InputError, shown
from llamita.text.messages import Message
from llamita.text.tokenizer import Detokenizer, Tokenizer

TokenIds = Sequence[int] | np.ndarray
Prompt = str | Sequence[Message] | TokenIds
DEFAULT_MAX_TOKENS = 256
DEFAULT_SPECULATE = 15  # what a step has rows for beside the newest token; the clock decides how many pay
_LARGEST_BIAS = 100.0  # OpenAI's bound: it all but forbids a token or demands it
_MOST_LOGPROBS = 20
_GREEDY = {"repetition_penalty", "frequency_penalty", "presence_penalty", "seed"}  # what it can be combined with
_SAMPLING = {field.name for field in fields(Sampling)}


class Options(TypedDict, total=False):
    """The options of `generate` and `stream`.

    A sampling option that is not given comes from the model's `generation_config.json` if that asks for sampling, else
    from `Sampling`, which explains each.
    """

    max_tokens: int | None  # 256 by default, None for all that the context leaves; 0 with prompt_logprobs alone
    greedy: bool  # always the likeliest token; excludes temperature, top_k, top_p, min_p
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None  # added to the logits of these tokens, -100 to 100
    min_tokens: int  # no end token and no stop string ends the text before so many tokens; 0 by default
    ignore_eos: bool  # no end token is drawn
    constraint: Constraint | None  # a grammar that the answer keeps to; see `engine/constraint.py`
    logprobs: int | None  # log-probabilities of every token and of so many of the likeliest, 0 to 20
    prompt_logprobs: int | None  # the same for the prompt
    show_special: bool  # special tokens are written out in the text, but for end tokens
    owner: str | None  # whose request it is: what the cache keeps is shared within one owner
    stop: Sequence[str]  # the text ends before the first of these to occur
    speculate: int  # the most tokens drafted from the text so far and verified together; 15 by default, 0 for none
    adapter: str | None  # the name of an adapter that the model was loaded with; none by default
    adaptor: str | None  # its former name


@dataclass
class Timings:
    """The tokens and seconds of one generation, without the time that the caller takes between two pieces.

    A step that several generations share counts in full for each of them.
    """

    prompt_tokens: int
    reused_tokens: int = 0  # prompt tokens whose keys and values came from another sequence
    generated_tokens: int = 0  # with the end token
    drafted_tokens: int = 0  # tokens that speculation drafted and a step verified
    accepted_tokens: int = 0  # drafted tokens that were right
    decode_steps: int = 0  # steps for the tokens after the first
    queue_seconds: float = 0.0  # from the call until a step takes in the beginning of the prompt
    prefill_seconds: float = 0.0  # for the prompt tokens that were not reused
    first_token_seconds: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # for the tokens after the first

    def note(self, drafted: int, accepted: int, started: float, began: float) -> None:
        """Count a step that gave tokens; the call `started` and the step `began` at these times."""
        now = time.perf_counter()
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if self.first_token_seconds:
            self.decode_seconds += now - began
            self.decode_steps += 1
        else:
            self.first_token_seconds = now - started

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, without the reused ones."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first, which the prefill gives."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: the answer, cut before a stop string.
        token_ids: its tokens, with those of a stop string, without the end token.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens) or "context" (it is full).
        timings: tokens and seconds.
        logprobs: of every generated token, with the end token; None if not asked for.
        prompt_logprobs: of every prompt token, None for the first; None if not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True)
class Request:
    """A request that has passed every check but that of memory, which the scheduler makes."""

    ids: np.ndarray  # int32 (tokens,)
    continues: bool  # the answer continues the prompt's text
    limit: int  # the most tokens to generate
    limit_reason: str  # the finish_reason when that is reached
    sampling: Sampling
    rules: Rules
    stop: tuple[str, ...]
    min_tokens: int  # no stop string ends the text before so many
    speculate: int  # the most drafted tokens in a step
    adapter: Adapter | None
    logprobs: int | None  # how many alternatives for each generated token
    prompt_logprobs: int | None  # the same for each prompt token
    show_special: bool
    owner: str | None
    started: float  # by time.perf_counter

    @property
    def declared_length(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.ids) + self.limit


def check_request(
    ids: np.ndarray,
    continues: bool,
    context: int,
    recommended: Sampling,
    options: Options,
    started: float,
    adapters: Mapping[str, Adapter],
    ends: tuple[int, ...],
    vocab_size: int,
) -> Request:
    """Return a request for prompt ids that are checked already, and options that are not.

    Raises:
        InputError: an option is out of its range or contradicts another.
    """
    prompt_logprobs = _check_logprobs("prompt_logprobs", options.get("prompt_logprobs"))
    room = context - len(ids)
    max_tokens = options.get("max_tokens", DEFAULT_MAX_TOKENS)
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, 1 if prompt_logprobs is None else 0)
    speculate = options.get("speculate", DEFAULT_SPECULATE)
    check_whole("speculate", speculate, 0)
    min_tokens = options.get("min_tokens", 0)
    check_whole("min_tokens", min_tokens, 0)
    return Request(
        ids=ids,
        continues=continues,
        limit=room if max_tokens is None else min(max_tokens, room),
        limit_reason="length" if max_tokens is not None and max_tokens <= room else "context",
        sampling=_sampling(recommended, options),
        rules=_rules(options, ends, vocab_size),
        stop=_stops(options),
        min_tokens=min_tokens,
        speculate=speculate,
        adapter=find_adapter(options.get("adapter", options.get("adaptor")), adapters),
        logprobs=_check_logprobs("logprobs", options.get("logprobs")),
        prompt_logprobs=prompt_logprobs,
        show_special=_check_bool("show_special", options.get("show_special", False)),
        owner=_check_owner(options.get("owner")),
        started=started,
    )


def _stops(options: Options) -> tuple[str, ...]:
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stop):
        raise InputError("stop", "texts that are not empty", shown(list(stop)))
    return stop


def _rules(options: Options, ends: tuple[int, ...], vocab_size: int) -> Rules:
    constraint = options.get("constraint")
    if constraint is not None and not isinstance(constraint, Constraint):
        raise InputError("constraint", "a Constraint", shown(constraint))
    min_tokens = None if _check_bool("ignore_eos", options.get("ignore_eos", False)) else options.get("min_tokens", 0)
    return Rules(_biases(options.get("logit_bias"), vocab_size), ends, min_tokens, constraint)


def _biases(biases: object, vocab_size: int) -> dict[int, float]:
    """Return checked biases by token."""
    if biases is None:
        return {}
    if not isinstance(biases, Mapping):
        raise InputError("logit_bias", "numbers by token id", shown(biases))
    for token, value in biases.items():
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InputError("logit_bias", f"token ids from 0 to {vocab_size - 1}", shown(token))
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_BIAS:
            raise InputError("logit_bias", f"numbers from {-_LARGEST_BIAS:g} to {_LARGEST_BIAS:g}", shown(value))
    return {int(token): float(value) for token, value in biases.items()}


def _check_logprobs(name: str, count: object) -> int | None:
    if count is None:
        return None
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST_LOGPROBS:
        raise InputError(name, f"a whole number from 0 to {_MOST_LOGPROBS}", shown(count))
    return count


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(name, "true or false", shown(value))
    return value


def _check_owner(owner: object) -> str | None:
    if owner is not None and not isinstance(owner, str):
        raise InputError("owner", "a text", shown(owner))
    return owner


def check_whole(name: str, value: object, least: int) -> None:
    """Raise InputError for anything but a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(name, f"a whole number of at least {least}", shown(value))


def find_adapter(name: object, adapters: Mapping[str, Adapter]) -> Adapter | None:
    """Return the adapter of this name, None for None.

    Raises:
        InputError: the model was loaded without an adapter of this name.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in adapters:
        known = f"one of {', '.join(adapters)}" if adapters else "none, because the model was loaded without"
        raise InputError("adapter", known, shown(name))
    return adapters[name]


def check_names(options: Options) -> None:
    """Raise TypeError for an unknown option, as a function does for an unknown argument."""
    known = sorted(Options.__annotations__)
    for name in sorted(options.keys() - set(known)):
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"{name}: unexpected option; try {near[0] if near else 'one of ' + ', '.join(known)}")


def check_prompt(prompt: Any) -> None:
    """Raise InputError for anything but a text or a sequence of token ids."""
    if isinstance(prompt, str | np.ndarray):
        return
    if isinstance(prompt, Sequence) and all(isinstance(part, int | np.integer) for part in prompt):
        return
    is_several = isinstance(prompt, Sequence) and all(isinstance(part, str) for part in prompt)
    hint = "try generate_many for several texts" if is_several else None
    raise InputError("prompt", "a text, messages or token ids", shown(prompt), hint)


def check_ids(token_ids: TokenIds, vocab_size: int, context: int) -> np.ndarray:
    """Return token ids as int32 (tokens,).

    Raises:
        InputError: there is none, too many for the context, or one outside the vocabulary.
    """
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # a ragged list
        ids = np.empty((0, 0))
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError("token ids", "one or more whole numbers", shown(token_ids))
    if len(ids) > context:
        raise InputError(
            "prompt",
            f"at most {context} tokens, the context",
            f"{len(ids)}",
            "try a shorter one, or a larger context (--context) if the model allows it",
        )
    largest = vocab_size - 1
    wrong = np.flatnonzero((ids < 0) | (ids > largest))
    if len(wrong):
        at = wrong[0]
        raise InputError("token ids", f"0 to {largest}", f"{ids[at]} at position {at}")
    return ids.astype(np.int32)


def _sampling(recommended: Sampling, options: Options) -> Sampling:
    """Replace what the model recommends by the caller's options."""
    given: dict[str, Any] = {n: v for n, v in options.items() if n in _SAMPLING and v is not None}
    if not options.get("greedy"):
        return replace(recommended, **given)
    if extra := sorted(given.keys() - _GREEDY):
        raise InputError("greedy", f"no {', '.join(extra)}, because it takes the likeliest token")
    return replace(recommended, temperature=0.0, **given)


class Answer:
    """Turns the tokens of one request into pieces of text, and decides when it ends.

    Attributes:
        timings: the scheduler writes its seconds and steps.
        finish_reason: None until the end.
        logprobs: of every generated token, with the end token, if the request asks for them.
        prompt_logprobs: of every prompt token, None for the first, if the request asks for them.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.timings = Timings(len(request.ids))
        self.finish_reason = None if request.limit else request.limit_reason
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self._request = request
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = Detokenizer(tokenizer, continues=request.continues, skip_special=not request.show_special)
        self._stops = StopStrings(request.stop)
        self._tokens: list[int] = []
        self._pieces: list[str] = []

    def add(self, token: int) -> str:
        """Add a token; return the text that can be shown now, perhaps ""."""
        self.timings.generated_tokens += 1
        if token in self._ends:
            self.finish_reason = "stop"
            return ""
        self._tokens.append(token)
        piece = self._detokenizer.add(token)
        if self.timings.generated_tokens >= self._request.min_tokens:
            piece = self._stops.add(piece)
        self._pieces.append(piece)
        if self._stops.found:
            self.finish_reason = "stop"
        elif self.timings.generated_tokens == self._request.limit:
            self.finish_reason = self._request.limit_reason
        return piece

    def finish(self) -> tuple[str, Generation]:
        """Return the last piece, perhaps "", and the whole."""
        piece = self._stops.add(self._detokenizer.finish()) + self._stops.finish()
        reason = "stop" if self._stops.found else self.finish_reason
        assert reason is not None
        request, text = self._request, "".join([*self._pieces, piece])
        return piece, Generation(
            text,
            self._tokens,
            reason,
            self.timings,
            logprobs=None if request.logprobs is None else self.logprobs,
            prompt_logprobs=None if request.prompt_logprobs is None else self.prompt_logprobs,
        )
