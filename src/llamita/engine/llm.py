"""The public face of the engine: load a model, ask it for logits or for text.

llm = llamita.load("embedded", preset="llama3.2")
print(llm.generate("Once upon a time", max_tokens=100).text)
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from llamita.chat import ChatTemplate, Message, read_template
from llamita.checkpoint import Checkpoint, ModelSource
from llamita.engine.cache import KV_DTYPES, SequenceCache
from llamita.engine.model import Model
from llamita.engine.sampler import Sampler, Sampling
from llamita.engine.stops import StopStrings
from llamita.engine.weights import load_weights
from llamita.errors import InputError
from llamita.packed import open_source
from llamita.quantize import RoundedSource
from llamita.scheme import QuantScheme, make_scheme
from llamita.threads import use_threads
from llamita.tokenizer import Detokenizer, Tokenizer, read_settings

TokenIds = Sequence[int] | np.ndarray
Prompt = str | Sequence[Message] | TokenIds
PREFILL_CHUNK = 256  # tokens a step: enough for the kernels' full speed, little memory for what lies between
DEFAULT_MAX_TOKENS = 256
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


@dataclass
class Timings:
    """Where the time of one generation went; what the caller does between two pieces does not count."""

    prompt_tokens: int
    generated_tokens: int = 0  # the end token included
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # for the tokens after the first

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

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
class _Request:
    """A checked request: all that can be wrong with one has been found."""

    ids: np.ndarray  # int32 (tokens,)
    continues: bool  # the answer goes on from the prompt's text
    limit: int  # tokens to generate at most
    limit_reason: str  # what it means to reach that
    sampling: Sampling
    stop: tuple[str, ...]
    started: float


def load(
    path_or_name: str | Path,
    *,
    preset: str | QuantScheme | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
) -> "LLM":
    """Load a model: a checkpoint, a quantized directory, a hub name, or "embedded".

    Args:
        path_or_name: what to load; a float model stays float unless a preset is given.
        preset: round a float model to this scheme while it loads.
        threads: of the kernels, for the whole process; by default all of the machine's.
        context: tokens of a sequence at most; by default what the model was made for.
        kv_dtype: "f32", "f16" or "int8" for keys and values; by default "f32" for a float model, "f16"
            for a quantized one. "int8" takes little more than half the memory of "f16".

    Raises:
        InputError, RunError: one line that says what is wrong.
    """
    use_threads(threads)
    source = open_source(path_or_name)
    if preset is not None:
        if not isinstance(source, Checkpoint):
            raise InputError(f"preset: expected a float model, got {path_or_name}, which is quantized")
        scheme = preset if isinstance(preset, QuantScheme) else make_scheme(preset)
        source = RoundedSource(source, scheme)
    return LLM(source, context=context, kv_dtype=kv_dtype)


class LLM:
    """A loaded model. Sequences are independent: any number may run at once.

    Attributes:
        path: its directory.
        config: its architecture.
        scheme: how its weights are rounded, None for a float model.
        context: tokens of a sequence at most.
        kv_dtype: "f32", "f16" or "int8".
        model: the forward pass, for those who drive it themselves.
    """

    def __init__(
        self, source: ModelSource, *, context: int | None = None, kv_dtype: str | None = None
    ) -> None:
        self.path, self.config, self.scheme = source.path, source.config, source.scheme
        self.context = self.config.context if context is None else context
        if not 0 < self.context <= self.config.context:
            raise InputError(f"context: expected 1 to {self.config.context} tokens, got {self.context}")
        self.kv_dtype = kv_dtype or ("f32" if self.scheme is None else "f16")
        if self.kv_dtype not in KV_DTYPES:
            raise InputError(
                f"kv_dtype (--kv-cache): expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}"
            )
        self.model = Model(self.config, load_weights(source))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use."""
        return Tokenizer(self.path, self.config)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, read on first use; InputError where it has none."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        return ChatTemplate(read_template(self.path), bos_token=bos, eos_token=eos)

    def logits(self, token_ids: TokenIds) -> np.ndarray:
        """The logits that follow every token: float32 (tokens, vocab).

        Raises:
            InputError: no tokens, more than the context holds, or an id outside the vocabulary.
        """
        ids = self.check_ids(token_ids)
        logits = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
        cache = self.new_sequence(len(ids))
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            self.model.step([(cache, ids[part])], np.arange(len(ids[part])), out=logits[part])
        return logits

    def iter_logits(self, token_ids: TokenIds, chunk: int = PREFILL_CHUNK) -> Iterator[np.ndarray]:
        """The same logits in arrays of up to `chunk` rows, for vocabularies whose whole would be too much."""
        ids = self.check_ids(token_ids)
        if chunk < 1:
            raise InputError(f"chunk: expected at least 1, got {chunk}")
        return self._iterate_logits(ids, chunk)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """What `stream` ends with."""
        *_, generation = self.stream(prompt, **options)
        assert isinstance(generation, Generation)
        return generation

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str | Generation]:
        """Continue a text, answer a conversation, or go on from token ids.

        Args:
            prompt: a text; messages, each with role and content; or token ids. Empty, it is the BOS token.
            options: see `Options`.

        Returns:
            An iterator over pieces of text, none of them empty or ending within a character, and at last
            the whole Generation.

        Raises:
            InputError: at once, and not on the first piece, where the prompt or an option is at fault.
        """
        return self._run(self._check(prompt, options))

    def new_sequence(self, declared_length: int) -> SequenceCache:
        """An empty sequence that may grow to this many tokens."""
        return SequenceCache(self.config, declared_length, self.kv_dtype, declared_length)

    def check_ids(self, token_ids: TokenIds) -> np.ndarray:
        """Token ids as int32 (tokens,), found to be within vocabulary and context."""
        try:
            ids = np.asarray(token_ids)
        except ValueError:  # a ragged list
            ids = np.empty((0, 0))
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            raise InputError(f"token ids: expected one or more whole numbers, got {str(token_ids)[:80]}")
        if len(ids) > self.context:
            raise InputError(f"prompt: expected at most {self.context} tokens, the context, got {len(ids)}")
        largest = self.config.vocab_size - 1
        wrong = np.flatnonzero((ids < 0) | (ids > largest))
        if len(wrong):
            at = wrong[0]
            raise InputError(f"token ids: expected 0 to {largest}, got {ids[at]} at position {at}")
        return ids.astype(np.int32)

    def _iterate_logits(self, ids: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        cache = self.new_sequence(len(ids))
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            logits = np.empty((len(part), self.config.vocab_size), dtype=np.float32)
            yield self.model.step([(cache, part)], np.arange(len(part)), out=logits)

    def _check(self, prompt: Prompt, options: Options) -> _Request:
        """A request from the caller's words."""
        started = time.perf_counter()
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unexpected options: {', '.join(sorted(unknown))}")
        max_tokens = options.get("max_tokens", DEFAULT_MAX_TOKENS)
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InputError(f"max_tokens: expected a whole number of at least 1, got {max_tokens!r}")
        stop = options.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop: expected texts that are not empty, got {list(stop)!r}")
        ids, continues = self._prompt_ids(prompt)
        room = self.context - len(ids)
        return _Request(
            ids=ids,
            continues=continues,
            limit=min(max_tokens, room),
            limit_reason="length" if max_tokens <= room else "context",
            sampling=self._sampling(options),
            stop=stop,
            started=started,
        )

    def _prompt_ids(self, prompt: Any) -> tuple[np.ndarray, bool]:
        """Token ids of a prompt, and whether it has text that the answer goes on from."""
        tokenizer = self.tokenizer
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            text = self.chat_template.render(prompt)
            ids = self.check_ids(tokenizer.encode(text, add_bos=False))
            return ids, False  # an answer is a text of its own
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not np.size(ids):
            if tokenizer.bos_token_id is None:
                raise InputError("prompt: expected some text, got none, and the model has no BOS token")
            ids = [tokenizer.bos_token_id]
        ids = self.check_ids(ids)
        return ids, any(tokenizer.token_bytes(token) for token in ids.tolist())

    def _sampling(self, options: Options) -> Sampling:
        """The model's recommendation with the caller's options in place of it."""
        given: dict[str, Any] = {n: v for n, v in options.items() if n in _SAMPLING and v is not None}
        base = Sampling.from_generation_config(read_settings(self.path, "generation_config.json"))
        if not options.get("greedy"):
            return replace(base, **given)
        if extra := sorted(given.keys() - {"repetition_penalty", "seed"}):
            raise InputError(f"greedy: expected without {', '.join(extra)}: it takes the likeliest token")
        return replace(base, temperature=0.0, **given)

    def _run(self, request: _Request) -> Iterator[str | Generation]:
        """Tokens to text, until something ends it."""
        timings = Timings(len(request.ids))
        detokenizer = Detokenizer(self.tokenizer, continues=request.continues)
        stops = StopStrings(request.stop)
        tokens, pieces, reason = [], [], request.limit_reason
        for token in self._tokens(request, timings):
            if token in self.tokenizer.eos_token_ids:
                reason = "stop"
                break
            tokens.append(token)
            pieces.append(stops.add(detokenizer.add(token)))
            if pieces[-1]:
                yield pieces[-1]
            if stops.found:
                break
        pieces.append(stops.add(detokenizer.finish()) + stops.finish())
        if pieces[-1]:
            yield pieces[-1]
        yield Generation("".join(pieces), tokens, "stop" if stops.found else reason, timings)

    def _tokens(self, request: _Request, timings: Timings) -> Iterator[int]:
        """The model's tokens, an end token like any other, up to the request's limit."""
        if request.limit == 0:
            return
        cache = self.new_sequence(len(request.ids) + request.limit)
        sampler = Sampler(request.sampling, request.ids, self.config.vocab_size)
        logits = np.empty((1, self.config.vocab_size), dtype=np.float32)
        began = time.perf_counter()
        self._prefill(cache, request.ids, logits)
        timings.prefill_seconds = time.perf_counter() - began
        token = sampler.choose(logits[0])
        timings.first_token_seconds = time.perf_counter() - request.started
        timings.generated_tokens = 1
        yield token
        for _ in range(request.limit - 1):
            began = time.perf_counter()
            self.model.step([(cache, np.array([token], dtype=np.int32))], out=logits)
            token = sampler.choose(logits[0])
            timings.decode_seconds += time.perf_counter() - began
            timings.generated_tokens += 1
            yield token

    def _prefill(self, cache: SequenceCache, ids: np.ndarray, logits: np.ndarray) -> None:
        """Take in a prompt; `logits` (1, vocab) are those after its last token."""
        last = (len(ids) - 1) // PREFILL_CHUNK * PREFILL_CHUNK  # where the last chunk begins
        for start in range(0, last, PREFILL_CHUNK):
            self.model.step([(cache, ids[start : start + PREFILL_CHUNK])], rows=np.arange(0))
        self.model.step([(cache, ids[last:])], out=logits)
