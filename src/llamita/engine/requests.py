"""What is asked of a model and what it answers: options, a checked request, text, timings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict

import numpy as np

from llamita.engine.adapters import Adapter
from llamita.engine.sampler import Sampling
from llamita.engine.stops import StopStrings
from llamita.errors import InputError
from llamita.text.chat_template import Message
from llamita.text.tokenizer import Detokenizer, Tokenizer

TokenIds = Sequence[int] | np.ndarray
Prompt = str | Sequence[Message] | TokenIds
DEFAULT_MAX_TOKENS = 256
DEFAULT_SPECULATE = 4  # a row more costs about a tenth of a step of one, and may bring a token
_SAMPLING = {field.name for field in fields(Sampling)}


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt.

    A sampling option that is not given comes from the model's `generation_config.json` if that asks for
    sampling, else from `Sampling`, which says what each means.
    """

    max_tokens: int  # 256 by default; the context ends a generation too, with finish_reason "context"
    greedy: bool  # always the likeliest token; excludes temperature, top_k, top_p, min_p
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: Sequence[str]  # the text ends before the first of these
    speculate: int  # tokens drafted from the text so far and verified together, 4 by default, 0 for none
    adapter: str | None  # the name of one that the model was loaded with; none by default


@dataclass
class Timings:
    """Where the time of one generation went; what the caller does between two pieces does not count.

    A step that several generations share counts in full for each of them.
    """

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, taken over from another sequence
    generated_tokens: int = 0  # the end token included
    drafted_tokens: int = 0  # verified by speculation
    accepted_tokens: int = 0  # of the drafted, those that were right
    decode_steps: int = 0  # that the tokens after the first took
    queue_seconds: float = 0.0  # from the call to the first step that took in a part of the prompt
    prefill_seconds: float = 0.0  # for the prompt tokens that were not reused
    first_token_seconds: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # for the tokens after the first

    def note(self, drafted: int, accepted: int, started: float, began: float) -> None:
        """Count a step that gave tokens: its drafts, when the call started, when the step began."""
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
        """Prompt tokens per second, of those that were computed."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first: that one comes from the prompt."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: what the model said, cut before a stop string.
        token_ids: its tokens without the end token, those of a stop string included.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens) or "context" (it is full).
        timings: where the time went.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings


@dataclass(frozen=True)
class Request:
    """A checked request: all that can be wrong with one has been found."""

    ids: np.ndarray  # int32 (tokens,)
    continues: bool  # the answer goes on from the prompt's text
    limit: int  # tokens to generate at most
    limit_reason: str  # what it means to reach that
    sampling: Sampling
    stop: tuple[str, ...]
    speculate: int  # drafted tokens a step at most
    adapter: Adapter | None
    started: float  # by time.perf_counter

    @property
    def declared_length(self) -> int:
        """Tokens that the sequence may reach."""
        return len(self.ids) + self.limit


def check_request(
    ids: np.ndarray, continues: bool, context: int, recommended: Sampling, options: Options, started: float,
    adapters: Mapping[str, Adapter],
) -> Request:  # fmt: skip
    """A request from checked prompt ids, the caller's options, when the call began, and adapters by name.

    Raises:
        InputError: an option is out of its range or at odds with another.
    """
    max_tokens = options.get("max_tokens", DEFAULT_MAX_TOKENS)
    speculate = options.get("speculate", DEFAULT_SPECULATE)
    for name, value, least in (("max_tokens", max_tokens, 1), ("speculate", speculate, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}", f"a whole number of at least {least}", f"{value!r}")
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stop):
        raise InputError("stop", "texts that are not empty", f"{list(stop)!r}")
    room = context - len(ids)
    return Request(
        ids=ids,
        continues=continues,
        limit=min(max_tokens, room),
        limit_reason="length" if max_tokens <= room else "context",
        sampling=_sampling(recommended, options),
        stop=stop,
        speculate=speculate,
        adapter=find_adapter(options.get("adapter"), adapters),
        started=started,
    )


def find_adapter(name: object, adapters: Mapping[str, Adapter]) -> Adapter | None:
    """The adapter of this name, None for none; InputError where the model has none of this name."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in adapters:
        known = ", ".join(adapters) or "none, as the model was loaded without"
        raise InputError("adapter", f"one of {known}", f"{name!r}")
    return adapters[name]


def check_names(options: Options) -> None:
    """TypeError for an option that does not exist, as a function has it for its arguments."""
    known = sorted(Options.__annotations__)
    for name in sorted(options.keys() - set(known)):
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"{name}: unexpected option; try {near[0] if near else 'one of ' + ', '.join(known)}")


def check_prompt(prompt: Any) -> None:
    """InputError for what is neither a text nor a sequence of one kind of things."""
    if isinstance(prompt, str | np.ndarray):
        return
    if isinstance(prompt, Sequence) and all(isinstance(part, int | np.integer) for part in prompt):
        return
    several = isinstance(prompt, Sequence) and all(isinstance(part, str) for part in prompt)
    hint = "; try generate_many for several texts" if several else ""
    raise InputError("prompt", "a text, messages or token ids", f"{repr(prompt)[:80]}{hint}")


def check_ids(token_ids: TokenIds, vocab_size: int, context: int) -> np.ndarray:
    """Token ids as int32 (tokens,), found to be within vocabulary and context."""
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # a ragged list
        ids = np.empty((0, 0))
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError("token ids", "one or more whole numbers", f"{str(token_ids)[:80]}")
    if len(ids) > context:
        raise InputError(
            "prompt",
            f"at most {context} tokens, the context",
            f"{len(ids)}",
            "try a shorter one, or a larger context (--context) where the model allows it",
        )
    largest = vocab_size - 1
    wrong = np.flatnonzero((ids < 0) | (ids > largest))
    if len(wrong):
        at = wrong[0]
        raise InputError("token ids", f"0 to {largest}", f"{ids[at]} at position {at}")
    return ids.astype(np.int32)


def _sampling(recommended: Sampling, options: Options) -> Sampling:
    """The model's recommendation with the caller's options in place of it."""
    given: dict[str, Any] = {n: v for n, v in options.items() if n in _SAMPLING and v is not None}
    if not options.get("greedy"):
        return replace(recommended, **given)
    if extra := sorted(given.keys() - {"repetition_penalty", "seed"}):
        raise InputError("greedy", f"without {', '.join(extra)}: it takes the likeliest token")
    return replace(recommended, temperature=0.0, **given)


class Answer:
    """Turns the tokens of one request into pieces of text, and knows when it is over.

    Attributes:
        timings: of the generation, kept by who computes it.
        finish_reason: None while it goes on.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.timings = Timings(len(request.ids))
        self.finish_reason = None if request.limit else request.limit_reason
        self._request = request
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = Detokenizer(tokenizer, continues=request.continues)
        self._stops = StopStrings(request.stop)
        self._tokens: list[int] = []
        self._pieces: list[str] = []

    def add(self, token: int) -> str:
        """The text that may be shown after this token, "" for none."""
        self.timings.generated_tokens += 1
        if token in self._ends:
            self.finish_reason = "stop"
            return ""
        self._tokens.append(token)
        piece = self._stops.add(self._detokenizer.add(token))
        self._pieces.append(piece)
        if self._stops.found:
            self.finish_reason = "stop"
        elif self.timings.generated_tokens == self._request.limit:
            self.finish_reason = self._request.limit_reason
        return piece

    def finish(self) -> tuple[str, Generation]:
        """The last piece, "" for none, and the whole."""
        piece = self._stops.add(self._detokenizer.finish()) + self._stops.finish()
        reason = "stop" if self._stops.found else self.finish_reason
        assert reason is not None
        return piece, Generation("".join([*self._pieces, piece]), self._tokens, reason, self.timings)
