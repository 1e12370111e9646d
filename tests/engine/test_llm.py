"""The public API: prompts of every kind, streaming, stop strings, limits, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_tokenizers import write_llama2, write_llama3
from tiny import make_checkpoint

import llamita
from llamita.engine.llm import LLM, PREFILL_CHUNK, Generation
from llamita.engine.scheduler import Scheduler, SequenceLimits
from llamita.engine.stops import StopStrings
from llamita.errors import InputError, RunError
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.numerics.scheme import make_scheme
from llamita.quantize.rounded import RoundedSource

PROMPT = "Once upon a time"
BOS, END, TURN_END = 256, 257, 258  # of the tiny checkpoints, whose other tokens are bytes


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture
def tiny(tmp_path: Path) -> LLM:
    return llamita.load(make_checkpoint(tmp_path, "llama3", max_position_embeddings=64))


class Script:
    """Replaces the forward pass: after the prompt comes the script, token by token."""

    def __init__(self, tokens: list[int], config: ModelConfig) -> None:
        self.config = config
        self._tokens = tokens
        self._prompt = 0  # its length, known with its last token

    def step(self, sequences: Any, rows: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        ((cache, ids),) = sequences
        cache.length += len(ids)
        assert cache.length <= cache.capacity
        assert rows is not None
        assert out is not None
        out[:] = 0
        if len(rows) and not self._prompt:
            self._prompt = cache.length
        for row, logits in zip(rows, out, strict=True):
            at = cache.length - len(ids) + row + 1 - self._prompt
            logits[self._tokens[min(at, len(self._tokens) - 1)]] = 100  # no other token has a chance
        return out


def scripted(llm: LLM, text: str | list[int], end: int = END) -> LLM:
    """Make the model say this, then end."""
    tokens = llm.tokenizer.encode(text, add_bos=False) if isinstance(text, str) else text
    script: Any = Script([*tokens, end], llm.config)
    limits = SequenceLimits(1, 2**30, 0, llm.kv_dtype, llm.context)
    llm.model, llm.scheduler = script, Scheduler(script, limits)
    return llm


def pieces_of(stream: Iterator[str | Generation]) -> tuple[list[str], Generation]:
    *pieces, generation = stream
    assert isinstance(generation, Generation)
    assert all(isinstance(piece, str) and piece for piece in pieces)
    return pieces, generation  # type: ignore[return-value]


# Text from prompts


def test_streaming_is_generating(embedded: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "seed": 3}
    pieces, streamed = pieces_of(embedded.stream(PROMPT, **options))
    generated = embedded.generate(PROMPT, **options)
    assert "".join(pieces) == streamed.text == generated.text
    assert len(pieces) > 10
    assert streamed.token_ids == generated.token_ids
    assert generated.text == embedded.tokenizer.decode(generated.token_ids)


def test_greedy_is_the_argmax_of_the_logits(embedded: LLM) -> None:
    generation = embedded.generate(PROMPT, max_tokens=12, greedy=True)
    ids = embedded.tokenizer.encode(PROMPT)
    logits = embedded.logits(ids + generation.token_ids)
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == generation.token_ids
    assert embedded.generate(PROMPT, max_tokens=12, temperature=0.0).token_ids == generation.token_ids


def test_greedy_tokens_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    llm = llamita.load("embedded")
    model = transformers.AutoModelForCausalLM.from_pretrained(llm.path, dtype=torch.float32)
    ids = llm.tokenizer.encode(PROMPT)
    found = llm.generate(PROMPT, max_tokens=40, greedy=True).token_ids
    with torch.no_grad():  # the likeliest token at every place of the text that we made
        expected = model(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].argmax(-1)
    assert found == expected.tolist()


def test_seeds_repeat(embedded: LLM) -> None:
    texts = [embedded.generate(PROMPT, max_tokens=30, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sequences_do_not_disturb_one_another(embedded: LLM) -> None:
    prompts = [PROMPT, "The dog", "One day, a bird " * 60]
    alone = [embedded.generate(prompt, max_tokens=15, greedy=True) for prompt in prompts]
    streams = [embedded.stream(prompt, max_tokens=15, greedy=True) for prompt in prompts]
    last: list[Any] = [None] * len(streams)
    going = set(range(len(streams)))
    while going:
        for i in sorted(going):
            piece = next(streams[i], None)
            last[i] = piece or last[i]
            going -= {i} if piece is None else set()
    assert [g.token_ids for g in last] == [g.token_ids for g in alone]


def test_prompts_may_be_text_tokens_or_messages(embedded: LLM) -> None:
    ids = embedded.tokenizer.encode(PROMPT)
    options: dict[str, Any] = {"max_tokens": 8, "greedy": True}
    text = embedded.generate(PROMPT, **options)
    assert embedded.generate(ids, **options).token_ids == text.token_ids
    assert embedded.generate(np.array(ids), **options).token_ids == text.token_ids
    messages = [{"role": "user", "content": PROMPT}]
    chat = embedded.generate(messages, **options)
    rendered = embedded.chat_template.render(messages)
    assert rendered == "<|begin_of_text|>Once upon a time\n"
    assert chat.token_ids == embedded.generate(embedded.tokenizer.encode(rendered), **options).token_ids
    assert chat.timings.prompt_tokens == len(embedded.tokenizer.encode(PROMPT + "\n"))  # BOS once


def test_a_template_decides_about_bos_and_an_answer_is_a_text_of_its_own(tiny: LLM, tmp_path: Path) -> None:
    write_llama2(tmp_path)  # a tokenizer that puts BOS before a text and a space before a word
    tiny.config = replace(tiny.config, vocab_size=32000, eos_token_ids=())
    (tmp_path / "chat_template.jinja").write_text("[INST]{{ messages[0].content }}[/INST]")
    answer = tiny.tokenizer.encode("Hello there", add_bos=False)
    generation = scripted(tiny, answer, 2).generate([{"role": "user", "content": "Hi"}])
    assert generation.text == "Hello there"
    assert generation.timings.prompt_tokens == len(tiny.tokenizer.encode("[INST]Hi[/INST]", add_bos=False))


@pytest.mark.parametrize("count", [1, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK])
def test_prompts_about_the_length_of_a_chunk(embedded: LLM, count: int) -> None:
    ids = np.random.default_rng(0).integers(2, 4096, count)
    generation = embedded.generate(ids, max_tokens=1, greedy=True)
    assert generation.token_ids in ([], [embedded.logits(ids)[-1].argmax()])  # [] if it ends there


def test_an_empty_prompt_is_the_bos_token_alone(tiny: LLM) -> None:
    for prompt in ("", [], np.array([], dtype=np.int64)):
        assert tiny.generate(prompt, max_tokens=3, greedy=True).timings.prompt_tokens == 1
    tiny.tokenizer.bos_token_id = None
    with pytest.raises(InputError, match="expected some text, got none"):
        tiny.generate("")


def test_iter_logits_are_the_logits(embedded: LLM) -> None:
    ids = embedded.tokenizer.encode("A word. " * 120)
    assert len(ids) > PREFILL_CHUNK
    whole = embedded.logits(ids)
    assert whole.dtype == np.float32
    assert whole.shape == (len(ids), embedded.config.vocab_size)
    np.testing.assert_array_equal(np.concatenate(list(embedded.iter_logits(ids, chunk=100))), whole)


def test_timings_add_up(embedded: LLM) -> None:
    timings = embedded.generate(PROMPT, max_tokens=20, greedy=True).timings
    assert timings.prompt_tokens == len(embedded.tokenizer.encode(PROMPT))
    assert timings.generated_tokens == 20
    assert 0 < timings.prefill_seconds <= timings.first_token_seconds
    assert timings.decode_rate == pytest.approx(19 / timings.decode_seconds)


# How a generation ends


def test_the_end_token_ends_and_is_no_text(tiny: LLM) -> None:
    generation = scripted(tiny, "abc").generate("x", max_tokens=20)
    assert (generation.text, generation.finish_reason, len(generation.token_ids)) == ("abc", "stop", 3)
    assert generation.timings.generated_tokens == 4
    tiny.tokenizer.eos_token_ids = (END, TURN_END)
    assert scripted(tiny, [*b"a", TURN_END, *b"b"]).generate("x").text != "ab"


def test_max_tokens_and_context_end_it(tiny: LLM) -> None:
    generation = scripted(tiny, "a" * 100).generate("x" * 10, max_tokens=5)
    assert (generation.text, generation.finish_reason) == ("aaaaa", "length")
    generation = scripted(tiny, "a" * 100).generate("x" * 10, max_tokens=1000)
    assert (len(generation.text), generation.finish_reason) == (54, "context")
    generation = scripted(tiny, "a" * 100).generate("x" * 10, max_tokens=54)
    assert (len(generation.text), generation.finish_reason) == (54, "length")
    generation = scripted(tiny, "a").generate("x" * 64)  # a prompt that fills the context
    assert (generation.text, generation.token_ids, generation.finish_reason) == ("", [], "context")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["END"], "one two "),
        (["two E"], "one "),
        (["ENDED", "END"], "one two "),
        (["D three", "E"], "one two "),
        (["nowhere"], "one two END three"),
        (["three!"], "one two END three"),  # begun, never finished: what was held back comes
        (["one"], ""),
        ("wo", "one t"),
    ],
)
def test_stop_strings_are_found_across_tokens(tiny: LLM, stop: Any, expected: str) -> None:
    scripted(tiny, "one two END three")  # one token for each byte
    pieces, generation = pieces_of(tiny.stream("x", max_tokens=50, stop=stop))
    assert "".join(pieces) == generation.text == expected
    assert generation.finish_reason == "stop"


def test_a_text_cut_by_length_gives_what_was_held_back(tiny: LLM) -> None:
    generation = scripted(tiny, "abcEN").generate("x", max_tokens=5, stop=["END"])
    assert (generation.text, generation.finish_reason) == ("abcEN", "length")


def test_stop_strings_overlapping_themselves() -> None:
    stops = StopStrings(["aab"])
    shown = "".join(stops.add(letter) for letter in "aaaab!")
    assert (shown, stops.found, stops.finish()) == ("aa", True, "")


def test_the_first_of_two_stop_strings_in_one_piece_counts() -> None:
    stops = StopStrings(["late", "early"])
    assert (stops.add("so early, so late"), stops.found) == ("so ", True)


# Whole characters


def test_a_stream_never_cuts_a_character(tiny: LLM) -> None:
    text = "a🦙é中 𝄞!"
    pieces, generation = pieces_of(scripted(tiny, text).stream("x", max_tokens=50))
    assert pieces == list(text)
    assert generation.text == text


def test_bytes_that_are_not_utf8_become_replacements(tiny: LLM) -> None:
    letters = tiny.tokenizer.encode("a", add_bos=False)
    lead = tiny.tokenizer.encode("中", add_bos=False)[0]
    pieces, generation = pieces_of(scripted(tiny, [*letters, lead, *letters, lead]).stream("x", max_tokens=10))
    assert generation.text == "a\ufffda\ufffd"
    assert pieces == ["a", "\ufffda", "\ufffd"]
    generation = scripted(tiny, [*letters, lead]).generate("x", max_tokens=2)  # cut inside a character
    assert generation.text == "a\ufffd"


@pytest.mark.parametrize("writer", [write_llama2, write_llama3])
def test_real_tokenizers_stream_continuations(writer: Any, tiny: LLM, tmp_path: Path) -> None:
    """Prompt and answer form one text, also with SentencePiece's leading spaces."""
    writer(tmp_path)
    tiny.config = replace(tiny.config, vocab_size=128256, eos_token_ids=())
    text, begun = "Hello my 🦙 friend, 你好 and  bye", "Hello my"
    ids = tiny.tokenizer.encode(text)
    cut = len(tiny.tokenizer.encode(begun))
    scripted(tiny, ids[cut:], tiny.tokenizer.eos_token_ids[0])
    pieces, generation = pieces_of(tiny.stream(ids[:cut], max_tokens=30))
    assert begun + "".join(pieces) == begun + generation.text == text
    assert not any("\ufffd" in piece for piece in pieces)


# Refusals, all of them before the first piece


def test_a_prompt_longer_than_the_context_tells_both_lengths(tiny: LLM) -> None:
    for call in (tiny.stream, tiny.logits, tiny.iter_logits):
        with pytest.raises(InputError, match=r"at most 64 tokens.*got 65"):
            call([1] * 65)
    with pytest.raises(InputError, match=r"at most 64 tokens.*got 70"):
        tiny.generate("x" * 70)


@pytest.mark.parametrize("ids", [[320], [-1], [5, 10**12], [1.5], ["a"], [[1, 2]], [[1], [1, 2]], [None], 7])
def test_invalid_token_ids_are_refused(tiny: LLM, ids: Any) -> None:
    with pytest.raises(InputError, match="token ids"):
        tiny.logits(ids)


def test_no_tokens_have_no_logits(tiny: LLM) -> None:
    with pytest.raises(InputError, match="token ids"):
        tiny.logits([])


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"temperature": -1.0},
        {"top_k": -2},
        {"top_p": 2.0},
        {"stop": [""]},
        {"stop": [3]},
        {"greedy": True, "temperature": 0.5},
    ],
    ids=str,
)
def test_impossible_options_are_refused(tiny: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        tiny.stream("x", **options)


def test_unknown_options_are_refused(tiny: LLM) -> None:
    with pytest.raises(TypeError, match="max_token: unexpected option; try max_tokens"):
        tiny.generate([1], max_token=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="tempreature"):
        tiny.stream("x", tempreature=1.0)  # type: ignore[call-arg]


def test_stray_bytes_in_a_prompt_are_refused(tiny: LLM) -> None:
    with pytest.raises(InputError, match="UTF-8"):
        tiny.stream("caf\udce9")


def test_a_model_without_a_template_does_not_chat(tiny: LLM) -> None:
    with pytest.raises(InputError, match="chat template"):
        tiny.stream([{"role": "user", "content": "Hi"}])


def test_load_refuses(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path)
    for options, expected in [
        ({"context": 0}, "context"),
        ({"context": 513}, "context: expected 1 to 512"),
        ({"kv_dtype": "f64"}, "kv_dtype: expected one of f32, f16, int8, got 'f64'"),
        ({"threads": 0}, "threads"),
        ({"scheme": "nope"}, "scheme: expected"),
    ]:
        with pytest.raises(InputError, match=expected):
            llamita.load(directory, **options)  # type: ignore[arg-type]


def test_load_takes_a_scheme_and_a_shorter_context(tmp_path: Path) -> None:
    llm = llamita.load(make_checkpoint(tmp_path), scheme=make_scheme("arm", group_size=64), context=100)
    assert llm.scheme is not None
    assert (llm.scheme.group_size, llm.context, llm.kv_dtype) == (64, 100, "f16")
    for wrong in ("100", 1.5):
        with pytest.raises(InputError, match=r"^context: expected 1 to 512 tokens, got "):
            llamita.load(llm.path, context=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^model: expected a path or a name, got None$"):
        llamita.load(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 100 tokens"):
        llm.generate("x" * 101)


def test_broken_weights_are_reported(tmp_path: Path) -> None:
    llm = llamita.load(make_checkpoint(tmp_path, dtype="F32"))
    weights = llm.model.weights
    llm.model.weights = replace(weights, norm=np.full_like(weights.norm, np.nan))
    with pytest.raises(RunError, match="logits"):
        llm.generate("x", max_tokens=2)


def test_a_float_model_stays_float_and_a_dtype_of_its_own(embedded: LLM) -> None:
    floats = llamita.load("embedded")
    assert (floats.scheme, floats.kv_dtype, embedded.kv_dtype) == (None, "f32", "f16")
    assert embedded.scheme is not None
    assert embedded.scheme.name == "llama3.2"


def test_mixed_kinds_in_one_layer(tmp_path: Path) -> None:
    """q and k rounded, v in float: parts of one fused layer, each by its own arithmetic."""
    directory = make_checkpoint(tmp_path, "llama3", dtype="F32", attention_bias=True)

    class Mixed(RoundedSource):
        def weight(self, name: str) -> Any:
            is_float = name.endswith(("v_proj", "up_proj"))
            return floats.weight(name) if is_float else super().weight(name)

    floats = Checkpoint(directory)
    mixed, whole = (LLM(make(floats, make_scheme("arm")), kv_dtype="f32") for make in (Mixed, RoundedSource))
    ids = np.arange(40)
    exact, rough = llamita.load(directory).logits(ids), whole.logits(ids)
    between = mixed.logits(ids)
    assert 0 < np.square(between - exact).mean() < np.square(rough - exact).mean()
    assert len(mixed.model.weights.blocks[0].qkv.parts) == 2


def test_memory_of_a_sequence_comes_with_its_tokens(tiny: LLM) -> None:
    lengths = [tiny.new_sequence(n).nbytes for n in (1, 64)]
    assert all(a <= b for a, b in pairwise(lengths))
