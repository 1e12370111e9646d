"""The loaded model that users of the library see. It gives logits and text."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from llamita.engine.adapters import Adapter
from llamita.engine.kv_cache import KV_DTYPES, SequenceCache
from llamita.engine.load import SequenceLimits
from llamita.engine.matches import read_corpus
from llamita.engine.model import Model
from llamita.engine.prefixes import BLOCK, whole_blocks
from llamita.engine.prompt_budget import PREFILL_CHUNK
from llamita.engine.requests import (
    Answer,
    Generation,
    Options,
    Prompt,
    Request,
    TokenIds,
    check_ids,
    check_names,
    check_prompt,
    check_request,
    check_whole,
    find_adapter,
)
from llamita.engine.sampler import Sampling
from llamita.engine.scheduler import Scheduler
from llamita.engine.sequence import SequenceState
from llamita.engine.stream import Stream
from llamita.engine.weights import FLOAT_MATHS, load_weights
from llamita.errors import InputError, RunError, shown
from llamita.models.weights import ModelSource
from llamita.system.machine import usable_memory
from llamita.text.chat_template import ChatTemplate, read_template
from llamita.text.messages import Message
from llamita.text.tokenizer import Tokenizer, read_settings

MAX_SEQUENCES = 16  # running at once: with more rows, reading the weights no longer limits a step


def check_cache(source: ModelSource, context: int | None, kv_dtype: str | None) -> tuple[int, str]:
    """Return the context and the type of keys and values, with defaults in place of None.

    Raises:
        InputError: the model does not allow the context, or the type is unknown.
    """
    longest = source.config.context
    context = longest if context is None else context
    if not isinstance(context, int | np.integer) or not 0 < context <= longest:
        raise InputError("context", f"1 to {longest} tokens", shown(context), f"try {longest}, the most that it allows")
    chosen = kv_dtype or ("f32" if source.scheme is None else "f16")
    if chosen not in KV_DTYPES:
        raise InputError("kv_dtype", f"one of {', '.join(KV_DTYPES)}", shown(kv_dtype))
    return context, chosen


class LLM:
    """A loaded model. Sequences are independent: any number may run at once, from any thread.

    Attributes:
        path: the model directory.
        config: the architecture.
        scheme: how the weights are rounded, None for a float model.
        context: the most tokens of a sequence.
        kv_dtype: the type of keys and values, "f32", "f16" or "int8".
        adapters: the loaded adapters, by the names that requests give them.
        model: the forward pass.
        scheduler: runs the generations.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        context: int | None = None,
        kv_dtype: str | None = None,
        max_sequences: int = MAX_SEQUENCES,
        cache_memory: int | None = None,
        prefix_cache: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        takes_adapters: bool = False,
        share_prefixes: bool = False,
        draft_from: Sequence[str | Path] | None = None,
        float_math: str = FLOAT_MATHS[0],
    ) -> None:
        """Load the weights. `llamita.load` explains the arguments; `adapters` are loaded already."""
        self.path, self.config, self.scheme = source.path, source.config, source.scheme
        self.context, self.kv_dtype = check_cache(source, context, kv_dtype)
        limits = self._limits(max_sequences, cache_memory, prefix_cache, share_prefixes)
        self.adapters = dict(adapters or {})
        self._corpus = read_corpus(draft_from, self.tokenizer) if draft_from else None
        if float_math not in FLOAT_MATHS:
            raise InputError("float_math", f"one of {', '.join(FLOAT_MATHS)}", shown(float_math))
        weights = load_weights(source, not (self.adapters or takes_adapters), float_math)
        self.model = Model(self.config, weights)
        self.scheduler = Scheduler(self.model, limits)

    @property
    def float_math(self) -> str:
        """How float layers are multiplied on this processor, "f32" or "bf16"."""
        return self.model.weights.float_math

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use."""
        return Tokenizer(self.path, self.config)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, read on first use.

        Raises:
            InputError: it has none.
        """
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        return ChatTemplate(read_template(self.path), bos_token=bos, eos_token=eos)

    def logits(self, token_ids: TokenIds, adapter: str | None = None) -> np.ndarray:
        """Return the logits after every token: float32 (tokens, vocab).

        Args:
            token_ids: at least one.
            adapter: the name of an adapter that the model was loaded with.

        Raises:
            InputError: there are no tokens, too many for the context, or an id outside the vocabulary.
        """
        ids = self.check_ids(token_ids)
        logits = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
        cache = self.new_sequence(len(ids))
        cache.adapter = find_adapter(adapter, self.adapters)
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            self.model.step([(cache, ids[part])], np.arange(len(ids[part])), out=logits[part])
        return logits

    def iter_logits(
        self, token_ids: TokenIds, chunk: int = PREFILL_CHUNK, adapter: str | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the same logits in arrays of up to `chunk` rows, where all together would take too much memory."""
        ids = self.check_ids(token_ids)
        if chunk < 1:
            raise InputError("chunk", "at least 1", f"{chunk}")
        cache = self.new_sequence(len(ids))
        cache.adapter = find_adapter(adapter, self.adapters)
        return self._iterate_logits(cache, ids, chunk)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Return the Generation that `stream` ends with."""
        return _last(self.stream(prompt, **options))

    def generate_many(
        self, prompts: Sequence[Prompt], *, adapters: Sequence[str | None] | None = None, **options: Unpack[Options]
    ) -> list[Generation]:
        """Generate from many prompts together. The results are those of one after the other, in less time.

        Args:
            prompts: any number, each as for `stream`.
            adapters: the adapter of each prompt, if they differ.
            options: for all prompts.

        Raises:
            InputError: a prompt, named by its place, or an option is at fault; no text has been generated.
            RunError: a generation failed; the others are cancelled.
        """
        if isinstance(prompts, str):
            raise InputError("prompts", "several texts", "one", "try [text]")
        if not isinstance(prompts, Iterable):
            raise InputError("prompts", "several texts", shown(prompts), "try a list")
        if adapters is not None and (len(adapters) != len(prompts) or "adapter" in options):
            expected = f"one for each of {len(prompts)} prompts and no adapter for all"
            raise InputError("adapters", expected, f"{len(adapters)}")
        requests = []
        for place, prompt in enumerate(prompts):
            own: Options = {} if adapters is None else {"adapter": adapters[place]}
            try:
                requests.append(self.check(prompt, **{**options, **own}))
            except InputError as error:
                raise error.within(f"prompt {place} of {len(prompts)}, from 0") from None
        streams = [self._submit(request) for request in requests]
        try:
            return [_last(stream) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Continue a text or token ids, or answer a conversation.

        All streams share the steps of the model, whether one thread reads them or several.

        Args:
            prompt: a text; messages, each with role and content; or token ids. An empty one becomes the BOS token.
            options: see `Options`.

        Returns:
            An iterator over pieces of text and, at last, the whole Generation. No piece is empty or ends within a
            character. Calling its `close` or dropping it cancels.

        Raises:
            InputError: the prompt or an option is at fault. It is raised by this call, not by the first piece.
        """
        return self._submit(self.check(prompt, **options))

    def check(self, prompt: Prompt, continues: bool | None = None, **options: Unpack[Options]) -> Request:
        """Return the checked request of `stream`'s arguments, for `sequence`; its time starts here.

        Args:
            prompt, options: as for `stream`.
            continues: whether the answer continues the prompt's text, so that a leading space belongs to it; by default
                it does, but not after messages.

        Raises:
            InputError: the prompt or an option is at fault.
        """
        started = time.perf_counter()
        check_names(options)
        ids, continued = self._prompt_ids(prompt)
        continues = continued if continues is None else continues
        recommended = Sampling.from_generation_config(read_settings(self.path, "generation_config.json"))
        ends, vocab = self.tokenizer.eos_token_ids, self.config.vocab_size
        context = self.context
        if options.get("max_tokens", 0) is None:  # all that is left: of the context, or of the memory if that is less
            context = min(context, max(len(ids) + 1, self.scheduler.load.room_positions))
        return check_request(ids, continues, context, recommended, options, started, self.adapters, ends, vocab)

    def sequence(self, request: Request) -> SequenceState:
        """Return a sequence for a checked request, to be submitted to `scheduler` by a driver with a thread."""
        return SequenceState(request, Answer(request, self.tokenizer), self._corpus)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_last: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, however many, open for the assistant's turn.

        Args:
            messages, tools, extra: see `ChatTemplate.render`.
            continue_last: the last message is an assistant's, to be continued.

        Raises:
            InputError: the model has no chat template, or that refuses the conversation.
        """
        text = self.chat_template.render(messages, tools=tools, continue_final_message=continue_last, extra=extra)
        return self.tokenizer.encode(text, add_bos=False)

    def embed(
        self,
        token_ids: TokenIds,
        adapter: str | None = None,
        chunk: int = PREFILL_CHUNK,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> np.ndarray:
        """Return the mean of the tokens' final hidden states, divided by its length: float32 (hidden,).

        A model that was not trained for embeddings gives rough ones: they tell texts of different subjects apart,
        and little more.

        Args:
            token_ids, adapter: see `logits`.
            chunk: tokens that are computed at once; generations wait meanwhile.
            is_wanted: asked before each chunk; False ends the work.

        Raises:
            InputError: see `logits`.
            RunError: it is not wanted any more.
        """
        ids = self.check_ids(token_ids)
        cache = self.new_sequence(len(ids))
        cache.adapter = find_adapter(adapter, self.adapters)
        total = np.zeros(self.config.hidden_size)
        for start in range(0, len(ids), chunk):
            if not is_wanted():
                raise RunError("embedding: nobody waits for it any more")
            total += self.model.final_states(cache, ids[start : start + chunk]).sum(axis=0, dtype=np.float64)
        return (total / max(float(np.linalg.norm(total)), np.finfo(np.float32).tiny)).astype(np.float32)

    def new_sequence(self, declared_length: int) -> SequenceCache:
        """Return the empty cache of a sequence that may reach this many tokens."""
        return SequenceCache(self.config, declared_length, self.kv_dtype, declared_length)

    def check_ids(self, token_ids: TokenIds) -> np.ndarray:
        """Return token ids as int32 (tokens,); InputError if the vocabulary or the context does not allow them."""
        return check_ids(token_ids, self.config.vocab_size, self.context)

    def _iterate_logits(self, cache: SequenceCache, ids: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            logits = np.empty((len(part), self.config.vocab_size), dtype=np.float32)
            yield self.model.step([(cache, part)], np.arange(len(part)), out=logits)

    def _submit(self, request: Request) -> Stream:
        return Stream(self.scheduler, self.sequence(request))

    def _limits(
        self, sequences: int, cache_memory: int | None, prefix_cache: int | None, share: bool
    ) -> SequenceLimits:
        """Return checked limits, with shares of the usable memory in place of None."""
        memory = usable_memory()
        block = self.new_sequence(BLOCK).nbytes
        whole = block * (whole_blocks(self.context) // BLOCK)
        cache_memory = memory // 2 if cache_memory is None else cache_memory
        prefix_cache = min(whole, memory // 8) if prefix_cache is None else prefix_cache
        check_whole("max_sequences", sequences, 1)
        check_whole("cache_memory", cache_memory, 1)
        check_whole("prefix_cache", prefix_cache, 0)
        prefix_cache = min(prefix_cache, cache_memory)
        return SequenceLimits(sequences, cache_memory, prefix_cache, self.kv_dtype, self.context, share)

    def _prompt_ids(self, prompt: Any) -> tuple[np.ndarray, bool]:
        """Return the token ids of a prompt, and whether the answer continues its text."""
        tokenizer = self.tokenizer
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            return self.check_ids(self.encode_chat(prompt)), False  # an answer begins a new text
        check_prompt(prompt)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not np.size(ids):
            if tokenizer.bos_token_id is None:
                raise InputError("prompt", "some text", "none", "the model has no BOS token to use instead")
            ids = [tokenizer.bos_token_id]
        ids = self.check_ids(ids)
        return ids, any(tokenizer.token_bytes(token) for token in ids.tolist())


def _last(stream: Stream) -> Generation:
    """Read a stream to its end and return the Generation."""
    *_, generation = stream
    assert isinstance(generation, Generation)
    return generation
