"""The numbers of `llamita compare`: against formulas, recorded errors, and models rotated by hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packed_models import pack_rotated, write_base_and_packed
from tiny import make_checkpoint, random_tensors, replace_tensors

import llamita
from llamita import _native
from llamita.engine.model import LINEAR_INPUTS
from llamita.errors import InputError
from llamita.evaluate import layers
from llamita.evaluate.compare import Interval, compare, is_noise, to_values
from llamita.evaluate.contenders import first_float, open_contenders
from llamita.evaluate.layers import first_tokens, origin_of, rotation_between, watch_layers, weight_errors
from llamita.evaluate.scores import Contender, score_text, score_tokens
from llamita.imports.open import open_source
from llamita.models import weights
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.packed import PackedModel
from llamita.numerics import affine
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.system.files import read_json
from llamita.text.tokenizer import Tokenizer

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 6
PROMPT = "It was"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float model, two quantized versions of it and a copy of one."""
    root = write_base_and_packed(tmp_path_factory.mktemp("compare"), "llama3.2")
    shutil.copytree(root / "g32", root / "copy")
    return root


def opened(root: Path, *names: str) -> list[Contender]:
    return open_contenders([str(root / name) for name in names], str(root / "base"))


@pytest.fixture(scope="module")
def comparison(root):
    contenders = opened(root, "g128", "g32", "copy")
    return compare(contenders, TEXT, prompt=PROMPT, max_tokens=12, chunk_tokens=200, places=4)


def test_scores_are_those_of_evaluate(root, comparison):
    scores = score_text(opened(root, "g128", "g32", "copy"), TEXT, chunk_tokens=200)
    assert [model.scores for model in comparison.models] == scores
    assert [model.name for model in comparison.models] == ["base", "g128", "g32", "copy"]
    assert [model.origin.method for model in comparison.models] == [None, "rtn", "rtn", "rtn"]


def test_differences_are_those_of_the_means_and_equal_models_differ_by_noise(comparison):
    pairs = {(d.first, d.second): d for d in comparison.differences}
    assert set(pairs) == {("g128", "g32"), ("g128", "copy"), ("g32", "copy")}
    _, g128, g32, _ = (model.scores for model in comparison.models)
    found = pairs["g128", "g32"]
    assert found.kl.value == pytest.approx(g32.kl.value - g128.kl.value, rel=1e-9)
    assert found.agreement.value == pytest.approx(g32.agreement.value - g128.agreement.value, abs=1e-12)
    assert found.perplexity.value == pytest.approx(g32.perplexity / g128.perplexity - 1, rel=1e-9)
    assert found.kl.high < 0  # smaller groups, smaller divergence: beyond noise even here
    same = pairs["g32", "copy"]
    assert (same.kl, same.perplexity, same.agreement) == (Interval(0, 0, 0),) * 3


@pytest.mark.parametrize(
    ("interval", "noise"), [((1, 0.5, 2), False), ((-1, -2, -0.5), False), ((1, -0.5, 2), True), ((0, 0, 0), True)]
)
def test_noise_is_an_interval_that_holds_zero(interval, noise):
    assert is_noise(Interval(*interval)) == noise


def test_weight_errors_are_those_that_quantize_recorded(root, comparison):
    for model in comparison.models[1:]:
        recorded = PackedModel(root / model.name).metadata.error.layers
        assert model.weight_errors == pytest.approx(recorded, rel=1e-5)
    assert comparison.models[0].weight_errors is None


@pytest.mark.parametrize("preset", ["arm:32", "llama3.2"])
def test_a_model_rounded_as_it_loads_is_the_one_that_quantize_writes(root, tmp_path, preset):
    name, _, group = preset.partition(":")
    scheme = make_scheme(name, int(group) if group else None)
    quantize(Checkpoint(root / "base"), str(root / "base"), tmp_path / "out", scheme)
    contenders = open_contenders([str(tmp_path / "out"), f"{root / 'base'}:{preset}"])
    assert [c.name for c in contenders] == ["base", "out", f"base:{preset}"]
    _, out, rounded = contenders
    assert rounded.weight_bytes == out.weight_bytes
    found = compare(contenders, TEXT, prompt=PROMPT, max_tokens=0)
    _, first, second = found.models
    assert first.weight_errors == second.weight_errors
    assert first.scores == second.scores
    assert first.origin == second.origin
    assert found.models[0].continuation is None


def test_watching_a_step_changes_no_bit_and_shows_what_its_layers_read(root, isa):
    ids = np.array(llamita.load(root / "base").tokenizer.encode(TEXT)[:300], np.int32)
    for name in ("base", "g32"):
        llm = llamita.load(root / name)
        model, cache = llm.model, llm.new_sequence(400)
        views = [(view.stream.copy(), view.inputs) for view in model.watch([(cache, ids)])]
        assert cache.length == len(ids)
        assert len(views) == llm.config.layers + 1
        assert not views[0][1]
        # what follows is what follows after a step, and the last stream is the head's
        next_id, rows = ids[:1], np.arange(len(ids))
        other = llm.new_sequence(400)
        logits = model.step([(other, ids)], rows).copy()
        np.testing.assert_array_equal(model._head(views[-1][0], None), logits)
        np.testing.assert_array_equal(model.step([(cache, next_id)]).copy(), model.step([(other, next_id)]).copy())
        for (before, _), (after, inputs), block in zip(views[:-1], views[1:], model.weights.blocks, strict=True):
            assert tuple(inputs) == LINEAR_INPUTS
            norm = _rmsnorm(before, block.attention_norm, llm.config.norm_eps)
            np.testing.assert_allclose(inputs["qkv"], norm, rtol=1e-4, atol=1e-5)
            assert after.shape == before.shape == inputs["gate_up"].shape


@pytest.mark.parametrize("is_rotated", [False, True])
def test_what_a_quantized_block_rounded_is_what_is_shown(root, isa, tmp_path, is_rotated):
    llm = llamita.load(pack_rotated(tmp_path) if is_rotated else root / "g32")
    ids = np.arange(77, dtype=np.int32)
    for view in llm.model.watch([(llm.new_sequence(100), ids)]):
        buffers = llm.model._buffers.first(len(ids))
        read = {"attention_out": buffers.attended, "gate_up": buffers.hidden, "down": buffers.inner}
        for name, operand in read.items() if view.inputs else ():
            again = _native.Activations(len(ids), view.inputs[name].shape[1])
            _native.quantize(view.inputs[name], again)
            for own, shown in zip(operand.codes.get(), again.get(), strict=True):
                np.testing.assert_array_equal(own, shown)


def test_a_float_block_is_the_sum_of_what_its_layers_make_of_their_inputs(root):
    llm, source = llamita.load(root / "base"), open_source(root / "base")
    ids = np.arange(200, dtype=np.int32)
    before = None
    for number, view in enumerate(llm.model.watch([(llm.new_sequence(200), ids)])):
        if before is not None:
            block = f"model.layers.{number - 1}"
            names = ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
            weights = {name: to_f32(source, f"{block}.{name}") for name in names}
            middle = before + view.inputs["attention_out"] @ weights["self_attn.o_proj"].T
            norm = source.vector(f"{block}.post_attention_layernorm.weight")
            expected = _rmsnorm(middle, norm, llm.config.norm_eps)
            np.testing.assert_allclose(view.inputs["gate_up"], expected, rtol=1e-3, atol=1e-4)
            gate, up = (view.inputs["gate_up"] @ weights[f"mlp.{n}_proj"].T for n in ("gate", "up"))
            np.testing.assert_allclose(view.inputs["down"], gate / (1 + np.exp(-gate)) * up, rtol=1e-3, atol=1e-4)
            after = middle + view.inputs["down"] @ weights["mlp.down_proj"].T
            np.testing.assert_allclose(view.stream, after, rtol=1e-3, atol=1e-4)
        before = view.stream.copy()


def to_f32(source, name: str) -> np.ndarray:
    return affine.to_f32(source.weight(name))


def _rmsnorm(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps) * gamma


def test_stream_errors_are_means_over_tokens_and_peaks_largest_values(root, monkeypatch):
    contenders = opened(root, "g128")
    chunks = [np.arange(100, dtype=np.int32), np.arange(100, 160, dtype=np.int32)]
    _, found = watch_layers(contenders, [None, None], chunks)
    errors, largest = [], None
    for chunk in chunks:
        streams = [
            [view.stream.copy() for view in c.llm.model.watch([(c.llm.new_sequence(100), chunk)])] for c in contenders
        ]
        base, own = (np.array(s, np.float64) for s in streams)  # (layers + 1, tokens, hidden)
        errors.append(np.square(own - base).sum(axis=2) / np.square(base).sum(axis=2))
        peaks = np.abs(own).max(axis=1)
        largest = peaks if largest is None else np.maximum(largest, peaks)
    np.testing.assert_allclose(found.stream_errors, np.concatenate(errors, axis=1).mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(found.peaks["stream"], largest)
    config = contenders[0].llm.config
    shapes = {place: peak.shape for place, peak in found.peaks.items()}
    assert shapes["stream"] == (config.layers + 1, config.hidden_size)
    assert shapes["down"] == (config.layers, config.intermediate_size)
    monkeypatch.setattr(layers, "PREFILL_CHUNK", 7)
    again = watch_layers(contenders, [None, None], chunks)[1]
    assert again.stream_errors == pytest.approx(found.stream_errors, rel=1e-12)


def rotated(directory: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """A checkpoint with the function of `base`, norms in its weights and its residual stream rotated by R."""
    make_checkpoint(directory, tie_word_embeddings=False)
    values = read_json(directory, "config.json")
    config = ModelConfig.from_hf(values)
    tied = random_tensors(ModelConfig.from_hf({**values, "tie_word_embeddings": True}))
    tensors = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"].copy()}
    stored = {n: affine.to_f32(f32_to_bf16(x)).astype(np.float64) for n, x in tensors.items()}
    turn = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0]
    for name, x in stored.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            norm = name.split("self_attn")[0] + "input_layernorm.weight"
            stored[name] = (x * stored[norm]) @ turn
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            norm = name.split("mlp")[0] + "post_attention_layernorm.weight"
            stored[name] = (x * stored[norm]) @ turn
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            stored[name] = turn.T @ x
        elif name == "lm_head.weight":
            stored[name] = (x * stored["model.norm.weight"]) @ turn
        elif name == "model.embed_tokens.weight":
            stored[name] = x @ turn
    for name in stored:
        if name.endswith("norm.weight"):
            stored[name] = np.ones(config.hidden_size)
    replace_tensors(directory, {n: x.astype(np.float32) for n, x in stored.items()}, "F32")
    return directory, turn


def test_a_rotated_stream_is_turned_back(root, tmp_path):
    path, turn = rotated(tmp_path / "rotated", np.random.default_rng(0))
    contenders = opened(root, "base", str(path))
    kl = score_text(contenders, TEXT)[1].kl
    assert kl
    assert kl.value < 1e-6  # it has the same function
    found = rotation_between(open_source(root / "base"), open_source(path))
    np.testing.assert_allclose(found, turn, atol=1e-5)
    ids = [np.arange(200, dtype=np.int32)]
    _, plain = watch_layers(contenders, [None, None], ids)
    _, turned = watch_layers(contenders, [None, found], ids)
    assert min(plain.stream_errors) > 0.1
    assert max(turned.stream_errors) < 1e-8
    found = compare(contenders, TEXT, prompt=PROMPT, max_tokens=0)  # nothing says that it is rotated
    assert found.notes == [
        "rotated: its embedding has nothing of base's: another model, or in another basis; "
        "only its outputs can be compared"
    ]


@pytest.mark.parametrize(
    ("method", "rotations", "is_transformed"),
    [("rtn", [], False), ("gptq+tune", [], False), ("equalize+gptq", [], True),
     ("spinquant+rtn", [{"name": "R1"}, {"name": "R2"}, {"name": "R4", "size": 8}], True)],
)  # fmt: skip
def test_transforms_and_rotations_come_from_the_metadata(root, method, rotations, is_transformed):
    source = PackedModel(root / "g32")
    source.metadata = replace(source.metadata, method=method, rotations=Rotations.from_list(rotations))
    origin = origin_of(source)
    assert origin.is_transformed == is_transformed
    assert origin.rotations == tuple(r["name"] for r in rotations)


def test_weights_of_a_transformed_model_are_not_compared(root, monkeypatch):
    contenders = opened(root, "g128", "g32")
    original = layers.origin_of

    def as_if_rotated(source):
        origin = original(source)
        is_g32 = source.path.name == "g32"
        return layers.Origin("spinquant+rtn", ("R1", "R2"), True) if is_g32 else origin

    monkeypatch.setattr("llamita.evaluate.compare.origin_of", as_if_rotated)
    found = compare(contenders, TEXT, prompt=PROMPT, max_tokens=0)
    _, g128, g32 = found.models
    assert g128.weight_errors
    assert (g32.weight_errors, g32.is_turned, g128.is_turned) == (None, True, False)
    assert g32.layers
    assert g32.layers.stream_errors[-1] < 1  # turned by what fits best, here nearly nothing
    (note,) = found.notes
    assert note.startswith("g32: weights were changed before they were rounded (spinquant+rtn, R1, R2): only")


def test_another_shape_is_compared_by_its_outputs_alone(root, tmp_path):
    deep = make_checkpoint(tmp_path / "deep", num_hidden_layers=3)
    found = compare(opened(root, "g32", str(deep)), TEXT, prompt=PROMPT, max_tokens=2)
    _, g32, other = found.models
    assert g32.layers
    assert (other.layers, other.weight_errors) == (None, None)
    assert other.scores.kl
    assert other.scores.kl.value > 0
    assert other.continuation
    assert found.notes == ["deep: another shape than base: nothing inside it is compared"]
    assert to_values(found)["models"][2]["stream_errors"] is None


def test_the_places_shown_are_those_of_the_largest_divergence(root, comparison):
    contenders = opened(root, "g128", "g32", "copy")
    tokens = score_tokens(contenders, TEXT, chunk_tokens=200)
    largest = np.sort(tokens.kl.max(axis=0))[::-1][:4]
    assert [max(o.kl for o in place.opinions) for place in comparison.disagreements] == largest.tolist()
    ids = contenders[0].llm.tokenizer.encode(TEXT)
    for place in comparison.disagreements:
        start = place.position // 200 * 200  # chunks do not see each other
        assert place.token == TEXT[place.position]
        assert place.context == TEXT[max(start, place.position - 16) : place.position]
        for contender, opinion in zip(contenders, place.opinions, strict=True):
            logits = contender.llm.logits(ids[start : place.position])[-1].astype(np.float64)
            p = np.exp(logits - logits.max())
            p /= p.sum()
            assert opinion.probability == pytest.approx(p.max(), rel=1e-5)
            assert opinion.right_probability == pytest.approx(p[ids[place.position]], rel=1e-4)
            assert opinion.said == _shown(contender.llm.tokenizer, int(p.argmax()))


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token of `tiny`'s: a byte, which may be part of a character, or a special one, or none."""
    special = {256: "<|begin_of_text|>", 257: "<|end_of_text|>", 258: "<|eot_id|>"}
    if token > 255:
        return special.get(token, f"<{token}>")
    byte = tokenizer.token_bytes(token)
    return byte.decode() if byte < b"\x80" else f"\\x{byte.hex()}"


def test_continuations_are_those_of_generate(root, comparison):
    base = llamita.load(root / "base").generate(PROMPT, max_tokens=12, greedy=True)
    for model in comparison.models:
        own = llamita.load(root / model.name).generate(PROMPT, max_tokens=12, greedy=True)
        found = model.continuation
        assert (found.text, found.tokens) == (own.text, len(own.token_ids))
        same = 0
        while own.token_ids[: same + 1] == base.token_ids[: same + 1] and same < len(own.token_ids):
            same += 1
        assert found.same_tokens == same
    assert comparison.models[0].continuation.same_tokens == comparison.models[0].continuation.tokens


def test_the_layers_are_watched_on_the_first_tokens(root, monkeypatch):
    chunks = [np.arange(5), np.arange(5, 10), np.arange(10, 12)]
    assert [c.tolist() for c in first_tokens(chunks, 7)] == [[0, 1, 2, 3, 4], [5, 6]]
    assert [len(c) for c in first_tokens(chunks, 100)] == [5, 5, 2]
    monkeypatch.setattr("llamita.evaluate.compare.LAYER_TOKENS", 50)
    assert compare(opened(root, "g32"), TEXT, prompt=PROMPT, max_tokens=0).layer_tokens == 50


def test_weight_errors_of_large_matrices_come_in_blocks(root, monkeypatch):
    sources = open_source(root / "g32"), open_source(root / "base")
    whole = weight_errors(*sources)
    monkeypatch.setattr(weights, "_ROWS", 7)
    assert weight_errors(*sources) == pytest.approx(whole, rel=1e-6)
    assert set(weight_errors(sources[1], sources[1]).values()) == {0.0}


def test_who_is_the_baseline(root):
    paths = [str(root / name) for name in ("g32", "base", "g128")]
    assert first_float(paths) == paths[1]
    assert first_float([paths[0], f"{paths[1]}:arm"]) is None
    assert [c.name for c in open_contenders([f"{paths[1]}:arm", paths[0]])] == ["base", "base:arm", "g32"]
    with pytest.raises(InputError, match="expected two or more models, got one"):
        compare(open_contenders([paths[1]], paths[1]), TEXT, prompt=PROMPT, max_tokens=1)


def test_a_relative_path_is_the_model_that_a_whole_path_names(root, monkeypatch):
    monkeypatch.chdir(root)
    assert [c.name for c in open_contenders(["g32", "base:arm"])] == ["base", "g32", "base:arm"]
    assert [c.name for c in open_contenders(["g32", "base"])] == ["base", "g32"]
    with pytest.raises(InputError, match="expected every model once"):
        open_contenders(["base", str(root / "base")])


def test_models_rounded_as_they_load_are_checked(root, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=1)
    base, g32 = str(root / "base"), str(root / "g32")
    for sources, message in (
        ([f"{base}:nope"], r"nope \(SRC:SCHEME or SRC:SCHEME:GROUP\): expected one of arm"),
        ([f"{base}:arm:48"], "SRC:SCHEME:GROUP\\): expected one of 32, 64, 128, 256, got 48"),
        ([f"{g32}:arm"], "expected a float model before the scheme"),
        ([f"{base}:arm", f"{base}:arm"], "expected every model once"),
        (
            [f"{base}:arm", f"{other}:arm"],
            r"other:arm: expected models made from the same one, got .*base and .*other; try ",
        ),
        ([f"{other}:arm", g32], r"other:arm: expected models made from the same one, got .*base and .*other; try "),
    ):
        with pytest.raises(InputError, match=message):
            open_contenders(sources)
    odd = shutil.copytree(base, tmp_path / "odd:arm")  # a directory of this name is that directory
    assert open_contenders([str(odd)])[0].llm.scheme is None
