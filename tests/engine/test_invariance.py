"""The same sequence gives bit-identical logits alone, in chunks, in a batch, on any number of threads.

Prefix reuse, batching and resuming rest on it. Checked on every instruction set that this machine has, for
float and for quantized weights.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import make_checkpoint

import llamita
from llamita import _native
from llamita.engine.llm import LLM

TOKENS = 150  # past a block of 128 keys
MODELS = {  # family, scheme, kv_dtype, overrides
    "float32": ("llama31", None, "f32", {"dtype": "F32"}),
    "bfloat16, half cache": ("llama2", None, "f16", {"dtype": "BF16", "attention_bias": True}),
    "bfloat16, bf16 math": ("llama31", None, "f32", {"dtype": "BF16"}),
    "g32, int8 tables": ("llama32", "llama3.2", "f16", {"attention_bias": True, "mlp_bias": True}),
    "g128, float tables": ("llama3", "arm", "f32", {}),
    "g32, int8 cache": ("llama32", "llama3.2", "int8", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    family, scheme, kv_dtype, overrides = MODELS[request.param]
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), family, **overrides)
    float_math = "bf16" if "bf16 math" in request.param else "f32"
    return llamita.load(directory, scheme=scheme, kv_dtype=kv_dtype, float_math=float_math)


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = _native.isa(), _native.threads()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)
    _native.set_threads(threads)


def random_ids(llm: LLM, seed: int, count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, llm.config.vocab_size, count)


def in_chunks(llm: LLM, ids: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate(list(llm.iter_logits(ids, chunk=size)))


def test_chunks_and_threads_change_nothing(llm: LLM, isa: str) -> None:
    ids = random_ids(llm, 0)
    _native.set_threads(1)
    whole = llm.logits(ids)
    assert np.isfinite(whole).all()
    for threads in (1, 2, 3):
        _native.set_threads(threads)
        np.testing.assert_array_equal(llm.logits(ids), whole)
        for size in (1, 7, 64):
            np.testing.assert_array_equal(in_chunks(llm, ids, size), whole)


def test_company_in_a_batch_changes_nothing(llm: LLM, isa: str) -> None:
    """Prompt chunks and single tokens of three sequences, mixed in the steps, in changing order."""
    _native.set_threads(2)
    lengths = (TOKENS, 40, 97)
    prompts = [random_ids(llm, seed, n) for seed, n in enumerate(lengths)]
    alone = [llm.logits(ids) for ids in prompts]
    caches = [llm.new_sequence(n) for n in lengths]
    rng, found = np.random.default_rng(3), [[] for _ in prompts]
    while any(cache.length < n for cache, n in zip(caches, lengths, strict=True)):
        going = [i for i in rng.permutation(len(prompts)) if caches[i].length < lengths[i]]
        step = [(caches[i], prompts[i][caches[i].length :][: rng.choice([1, 1, 5, 33])]) for i in going]
        counts = [len(ids) for _, ids in step]
        logits = llm.model.step(step, rows=np.arange(sum(counts))).copy()
        for i, part in zip(going, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            found[i].append(part)
    for parts, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_asking_for_some_rows_changes_none_of_them(llm: LLM) -> None:
    ids = random_ids(llm, 0, 20)
    whole = llm.logits(ids)
    some = llm.model.step([(llm.new_sequence(20), ids)], rows=np.array([3, 19]))
    np.testing.assert_array_equal(some, whole[[3, 19]])
    cache = llm.new_sequence(20)
    nothing = llm.model.step([(cache, ids[:5])], rows=np.arange(0))
    assert nothing.shape == (0, llm.config.vocab_size)
    np.testing.assert_array_equal(llm.model.step([(cache, ids[5:])]), whole[-1:])


@pytest.mark.parametrize("tokens", [0, 17, 130])
def test_a_copied_prefix_changes_nothing(llm: LLM, tokens: int) -> None:
    ids = random_ids(llm, 0)
    source, copy = llm.new_sequence(TOKENS), llm.new_sequence(TOKENS + 10)
    whole = llm.model.step([(source, ids)], rows=np.arange(TOKENS)).copy()
    copy.copy_prefix(source, tokens)
    assert copy.length == tokens
    rest = llm.model.step([(copy, ids[tokens:])], rows=np.arange(TOKENS - tokens))
    np.testing.assert_array_equal(rest, whole[tokens:])


def test_a_prefix_longer_than_its_source_is_refused(llm: LLM) -> None:
    source = llm.new_sequence(8)
    llm.model.step([(source, random_ids(llm, 0, 5))])
    with pytest.raises(ValueError, match="tokens: expected at most 5, got 6"):
        llm.new_sequence(8).copy_prefix(source, 6)


def test_every_instruction_set_gives_the_same_logits(llm: LLM) -> None:
    """Check more than the specification asks: float kernels too take sums in the same order everywhere."""
    if llm.float_math == "bf16":
        pytest.skip("bf16 products are those of one instruction")
    ids, before = random_ids(llm, 0, 30), _native.isa()
    try:
        results = []
        for name in _native.available_isas():
            _native.set_isa(name)
            results.append(llm.logits(ids))
    finally:
        _native.set_isa(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_dynamic_rope_depends_on_the_declared_length_alone(tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path, "llama2", max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    )
    llm = llamita.load(directory)
    ids = random_ids(llm, 0, 120)
    np.testing.assert_array_equal(in_chunks(llm, ids, 9), llm.logits(ids))
