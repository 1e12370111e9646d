"""Perplexity, KL and agreement against their formulas in float64, chunk borders, baselines."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distances import log_softmax
from tiny import make_checkpoint

import llamita
from llamita.errors import InputError, RunError
from llamita.evaluate import scores as evaluate_scores
from llamita.evaluate.contenders import open_contenders
from llamita.evaluate.scores import Contender, Interval, score_text, split_chunks, token_losses
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 4


class TableModel:
    """Stands in for an LLM: logits depend on the last token and on how many came before it."""

    def __init__(self, seed: int, *, vocab: int = 300, scale: float = 3.0, offset: float = 0.0,
                 context: int = 2048) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.table = (scale * rng.standard_normal((256, vocab)) + offset).astype(np.float32)
        self.drift = rng.standard_normal(vocab).astype(np.float32)
        self.config = SimpleNamespace(vocab_size=vocab)
        self.tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
        self.context = context
        self.calls: list[list[int]] = []

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids] + np.arange(len(ids), dtype=np.float32)[:, None] / 100 * self.drift

    def iter_logits(self, ids: np.ndarray, chunk: int, adapter: str | None):
        self.calls.append(list(ids))
        logits = self.logits(ids)
        for start in range(0, len(ids), chunk):
            yield logits[start : start + chunk]


def contenders(*models: Any, baseline: bool = True) -> list[Contender]:
    return [Contender(f"m{i}", model, baseline and i == 0) for i, model in enumerate(models)]


def by_formula(models: list[Any], ids: np.ndarray, length: int) -> list[dict[str, float]]:
    """The definition, one chunk after the other, everything in float64."""
    chunks = [ids[i : i + length] for i in range(0, len(ids), length)]
    chunks = [c for c in chunks if len(c) > 1]
    found = []
    for model in models:
        loss, kl, agree = [], [], []
        for chunk in chunks:
            log_p, log_q = log_softmax(models[0].logits(chunk[:-1])), log_softmax(model.logits(chunk[:-1]))
            loss += list(-log_q[np.arange(len(chunk) - 1), chunk[1:]])
            kl += list((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            agree += list(log_p.argmax(axis=1) == log_q.argmax(axis=1))
        found.append({"perplexity": np.exp(np.mean(loss)), "kl": np.mean(kl), "agreement": np.mean(agree)})
    return found


@pytest.mark.parametrize(("scale", "offset"), [(3.0, 0.0), (0.01, 0.0), (30.0, 0.0), (3.0, 1000.0)])
@pytest.mark.parametrize("length", [2048, 100, 7])
def test_scores_are_those_of_the_formulas(scale, offset, length):
    first = TableModel(0, scale=scale, offset=offset)
    near = TableModel(0, scale=scale, offset=offset)
    near.table += np.random.default_rng(5).normal(0, 0.1 * scale, near.table.shape).astype(np.float32)
    models = [first, near, TableModel(1, scale=scale, offset=-offset)]
    scores = score_text(contenders(*models), TEXT, chunk_tokens=length)
    expected = by_formula(models, np.array(list(TEXT.encode())), length)
    for i, (got, want) in enumerate(zip(scores, expected, strict=True)):
        assert got.perplexity == pytest.approx(want["perplexity"], rel=1e-5 if offset else 1e-6)
        if i:
            assert got.kl is not None
            assert got.agreement is not None
            assert got.increase is not None
            assert got.kl.value == pytest.approx(want["kl"], rel=1e-5, abs=1e-7)
            assert got.agreement.value == pytest.approx(want["agreement"])
            ratio = want["perplexity"] / expected[0]["perplexity"]
            assert got.increase.value == pytest.approx(ratio - 1, rel=1e-4)
            assert got.kl.low <= got.kl.value <= got.kl.high
    assert scores[0].kl is None


def test_a_model_against_itself_has_no_divergence_at_all():
    scores = score_text(contenders(TableModel(0), TableModel(0)), TEXT)
    assert scores[1].kl == Interval(0, 0, 0)
    assert scores[1].increase == Interval(0, 0, 0)
    assert scores[1].agreement == Interval(1, 1, 1)


def test_small_blocks_of_rows_change_nothing(monkeypatch):
    models = [TableModel(0), TableModel(1)]
    whole = score_text(contenders(*models), TEXT)
    monkeypatch.setattr(evaluate_scores, "_VALUES_AT_ONCE", 1)
    monkeypatch.setattr(evaluate_scores, "_LOGIT_BYTES", 1)
    assert score_text(contenders(*models), TEXT) == whole


def test_chunks_do_not_see_each_other_and_predict_all_but_their_first_token():
    model, ids = TableModel(0), list(TEXT.encode())
    scores = score_text(contenders(model), TEXT, chunk_tokens=150)
    assert [len(call) for call in model.calls] == [149, 149, 63]  # 364 tokens: 150 + 150 + 64
    assert model.calls == [ids[:149], ids[150:299], ids[300:363]]
    assert scores[0].tokens == 149 + 149 + 63


def test_split_chunks_borders():
    ids = np.arange(10)
    assert [list(c) for c in split_chunks(ids, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(c) for c in split_chunks(ids, 4, whole=True)] == [4, 4]
    assert [len(c) for c in split_chunks(ids, 3)] == [3, 3, 3]  # one token is left: it predicts nothing
    assert [len(c) for c in split_chunks(ids, 5, whole=True)] == [5, 5]
    assert split_chunks(ids[:1], 4) == []
    with pytest.raises(InputError, match="at least 2"):
        split_chunks(ids, 1)


def test_limit_and_context_bound_the_work():
    model = TableModel(0, context=50)
    scores = score_text(contenders(model), TEXT, limit=2)
    assert [len(call) for call in model.calls] == [49, 49]
    assert scores[0].tokens == 98


def test_without_a_baseline_nothing_is_compared():
    scores = score_text(contenders(TableModel(0), TableModel(1), baseline=False), TEXT)
    assert [(s.kl, s.agreement, s.increase) for s in scores] == [(None, None, None)] * 2


def test_token_losses():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 5, (37, 1000)).astype(np.float32), rng.integers(0, 1000, 37)
    expected = -log_softmax(logits)[np.arange(37), targets]
    np.testing.assert_allclose(token_losses(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_named_not_averaged(bad):
    broken = TableModel(1)
    broken.table[:] = bad
    with pytest.raises(RunError, match=r"m1: logits: expected finite numbers"):
        score_text(contenders(TableModel(0), broken), TEXT)


def test_refuses_texts_without_a_prediction_and_models_with_other_tokens():
    with pytest.raises(InputError, match="at least 2 tokens, got 1"):
        score_text(contenders(TableModel(0)), "x")
    with pytest.raises(InputError, match="at least 2048 tokens"):
        score_text(contenders(TableModel(0)), TEXT, whole_chunks=True)
    other = TableModel(0)
    other.tokenizer = SimpleNamespace(encode=lambda text: [5, *text.encode()])
    with pytest.raises(InputError, match="m1: expected the tokens of m0"):
        score_text(contenders(TableModel(0), other), TEXT)
    with pytest.raises(InputError, match="m1: expected the tokens of m0"):
        score_text(contenders(TableModel(0), TableModel(0, vocab=301)), TEXT)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A float checkpoint, two quantized directories made from it, and one made from another."""
    root = tmp_path_factory.mktemp("models")
    found = {name: make_checkpoint(root / name, seed=seed) for name, seed in (("float", 0), ("other", 1))}
    for name, source, group in (("g128", "float", 128), ("g32", "float", 32), ("stranger", "other", 128)):
        found[name] = root / name
        scheme = make_scheme("arm", group)
        quantize(Checkpoint(found[source]), str(found[source]), found[name], scheme)
    return found


def test_recorded_source_is_the_baseline_and_comes_first(models):
    found = open_contenders([str(models["g128"]), str(models["g32"])])
    assert [c.name for c in found] == ["float", "g128", "g32"]
    assert [c.is_baseline for c in found] == [True, False, False]
    scores = score_text(found, TEXT, chunk_tokens=100)
    assert scores[1].kl
    assert scores[2].kl
    assert 0 < scores[2].kl.value < scores[1].kl.value  # smaller groups, smaller error
    assert 0 < found[1].weight_bytes < found[0].weight_bytes
    expected = by_formula([c.llm for c in found], np.array(found[0].llm.tokenizer.encode(TEXT)), 100)
    for got, want in zip(scores[1:], expected[1:], strict=True):
        assert got.kl
        assert got.kl.value == pytest.approx(want["kl"], rel=1e-5)


def test_float_models_need_no_baseline_and_quantized_ones_may_go_without(models):
    assert [c.is_baseline for c in open_contenders([str(models["float"])])] == [False]
    assert [c.name for c in open_contenders([str(models["g128"])], "none")] == ["g128"]
    names = [c.name for c in open_contenders([str(models["g128"]), str(models["float"])])]
    assert names == ["float", "g128"]  # the baseline is not listed twice


def test_baselines_that_are_wrong_are_refused(models, tmp_path):
    with pytest.raises(InputError, match="expected one made from"):
        open_contenders([str(models["g128"]), str(models["stranger"])])
    with pytest.raises(InputError, match="every model once"):
        open_contenders([str(models["g128"]), str(models["g128"])])
    changed = make_checkpoint(tmp_path / "changed")
    packed = tmp_path / "packed"
    quantize(Checkpoint(changed), str(changed), packed, make_scheme("arm"))
    shutil.rmtree(changed)
    make_checkpoint(changed, seed=9)
    with pytest.raises(InputError, match=r"expected the file that .* was made from"):
        open_contenders([str(packed)])
    shutil.rmtree(changed)
    with pytest.raises(InputError, match=r"its recorded source is missing: .*; try --baseline SRC, or none"):
        open_contenders([str(packed)])


def test_public_api_loads_the_same(models):
    llm = llamita.load(models["float"])
    assert score_text([Contender("x", llm, False)], TEXT)[0].perplexity > 1
