"""Programs for ExecuTorch, run in its own runtime: integers, logits, and the other files that an app needs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter
from command import one_line, run
from packed_models import pack_by_command
from tiny import make_checkpoint, replace_tensors

import llamita
from llamita.models.names import HEAD
from llamita.models.packed import PackedModel

pytest.importorskip("executorch", reason="the runtime of programs")
torch = pytest.importorskip("torch", reason="export is on the Torch side")

from layerwise import READERS, guided, watch  # noqa: E402

from llamita.export.lowering import data_hashes  # noqa: E402
from llamita.export.program import make_program  # noqa: E402
from llamita.export.proof import compare, engine_of, own_tokens, rounded_hashes  # noqa: E402
from llamita.export.runtime import run as run_program  # noqa: E402

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def modules_of(program: Any) -> dict[str, Any]:
    """The linear layers of a program by the engine's names, without what is around them."""
    found = {HEAD: program.head[-1] if isinstance(program.head, torch.nn.Sequential) else program.head}
    for i, layer in enumerate(program.model.layers):
        for names in READERS.values():
            for name in names:
                module = layer.get_submodule(name)
                while hasattr(module, "linear"):
                    module = module.linear
                found[f"model.layers.{i}.{name}"] = module
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A packed model, its program, and what was recorded of it; made once, as it takes seconds."""
    directory = tmp_path_factory.mktemp("exported")
    packed = pack_by_command(directory)
    assert run("export", packed, "--to", "executorch", "-o", directory / "out", "--context", "64") == 0
    return (packed, directory / "out", json.loads((directory / "out" / "llamita_export.json").read_text("utf-8")))


def test_a_program_holds_the_integers_and_computes_as_the_engine(
    exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    packed, out, record = exported
    proof = record["proof"]
    assert proof["holds"] is True
    assert proof["equal_layers"] == proof["layers"] == 2 * 7 + 1
    assert proof["kl"] < 1e-3
    assert proof["noise"] < 2 * proof["own_noise"]
    assert proof["tokens"] == 64
    assert {path.name for path in out.iterdir()} >= {"model.pte", "tokenizer.json", "README.md", "llamita_export.json"}
    assert json.loads((out / "llamita_export.json").read_text("utf-8"))["target"] == "executorch"
    assert "64 tokens" in (out / "README.md").read_text("utf-8")
    held = data_hashes(out / "model.pte")
    other = pack_by_command(tmp_path / "other", seed=1)  # other weights: the comparison can fail
    assert not any(codes in held for _, codes, _ in rounded_hashes(PackedModel(other)))
    damaged = bytearray((out / "model.pte").read_bytes())
    damaged[-100] ^= 1  # in the data of the last layer
    (tmp_path / "damaged.pte").write_bytes(damaged)
    still = data_hashes(tmp_path / "damaged.pte")
    assert sum(c in still and s in still for _, c, s in rounded_hashes(PackedModel(packed))) < proof["layers"]
    capsys.readouterr()
    assert run("export", packed, "--to", "executorch", "-o", out) == 2
    assert "exists; try --overwrite" in one_line(capsys)


def test_runners_find_what_they_ask_for(exported: tuple[Path, Path, dict[str, Any]]) -> None:
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.runtime import Runtime

    program: Any = Runtime.get().load_program(exported[1] / "model.pte")
    found = {name: program.load_method(name).execute([]) for name in program.method_names - {"forward"}}
    config = PackedModel(exported[0]).config
    assert found["get_max_seq_len"] == [64]
    assert found["get_vocab_size"] == [config.vocab_size]
    assert found["get_n_layers"] == [config.layers]
    assert found["use_kv_cache"] == found["use_sdpa_with_kv_cache"] == found["enable_dynamic_shape"] == [True]
    assert set(found["get_eos_ids"]) == set(llamita.load(exported[0]).tokenizer.eos_token_ids)


def test_executorchs_runner_for_text_models_takes_it(exported: tuple[Path, Path, dict[str, Any]]) -> None:
    """What its apps call, with the tokenizer next to the program."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from executorch.kernels import quantized  # noqa: F401  the operator of the embedding

    _, out, _ = exported
    runner, stats = TextLLMRunner(str(out / "model.pte"), str(out / "tokenizer.json")), list[Any]()
    config = GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False)
    runner.generate("abc", config, stats_callback=stats.append)  # its text may be no UTF-8, of random weights
    assert stats[0].num_prompt_tokens >= 3
    assert 1 <= stats[0].num_generated_tokens <= 8


def test_a_pass_of_many_tokens_that_forgets_is_found(
    exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The proof's prefill begins with empty caches, so what it does not write is missed."""
    packed, out, record = exported
    assert record["proof"]["prefill"] < 2 * record["proof"]["own_noise"]
    engines = engine_of(PackedModel(packed))
    tokens, prompt, new = own_tokens(engines[0], 64)
    ran = run_program(out / "model.pte", tokens, prompt, new)
    assert compare(engines, (1, 1), tokens, ran).holds
    assert ran.prefill is not None
    forgets = replace(ran, prefill=np.roll(ran.prefill, 1, axis=-1))
    assert not compare(engines, (1, 1), tokens, forgets).holds


def test_nothing_in_the_users_directory_is_run(
    exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    assert len(run_program(exported[1] / "model.pte", [1, 2, 3], 2, 1).greedy) == 1


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama2", ("--group-size", "64")),
        ("tinyllama", ("--group-size", "64", "--fit-groups")),  # 352 inputs of down_proj: groups of 32
        ("llama31", ()),
        ("llama32", ("--method", "spinquant", "--set", "spinquant.steps=0")),
        ("llama3", ("--preset", "arm", "--group-size", "32")),
    ],
)
def test_the_program_computes_what_the_engine_does(tmp_path: Path, family: str, options: Any) -> None:
    """In eager Torch: architectures, rotations, float tables."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    packed = pack_by_command(tmp_path, family, *options)
    source, passed = PackedModel(packed), watch(llamita.load(packed, kv_dtype="f32"), IDS)
    program = make_program(source, 64)
    with guided(modules_of(program), source, passed.last(4)):
        program(torch.tensor([IDS[:5]]), torch.tensor([0]))
        for place, token in enumerate(IDS[5:], 5):
            program(torch.tensor([[token]]), torch.tensor([place]))


def test_adapters_go_along_unmerged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    from llamita.models.peft import read_adapter

    packed = PackedModel(pack_by_command(tmp_path))
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model")
    llm = llamita.load(packed.path, kv_dtype="f32", adapters={"a": adapter})
    passed = watch(llm, IDS, "a").last(len(IDS) - 1)
    with_adapter, without = (make_program(packed, 64, one) for one in (read_adapter(adapter, packed.config), None))
    with guided(modules_of(with_adapter), packed, passed):
        with_adapter(torch.tensor([IDS]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="input of"), guided(modules_of(without), packed, passed):
        without(torch.tensor([IDS]), torch.tensor([0]))


def test_an_int4_embedding_is_near_the_int8_one(tmp_path: Path) -> None:
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401

    packed = PackedModel(pack_by_command(tmp_path))
    ids = torch.tensor([IDS])
    wide, narrow = (make_program(packed, 64, None, bits).model.embed_tokens(ids) for bits in (8, 4))
    error = ((wide - narrow) ** 2).sum() / (wide**2).sum()
    assert 0 < error < 0.02


def test_each_mistake_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_by_command(tmp_path)
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    capsys.readouterr()
    for options, code, message in (
        (("--context", "100000"), 2, "--context: expected 8 to"),
        (("--backend", "magic"), 2, "--backend: expected one of xnnpack"),
        (("--backend", "qnn"), 1, "expected Qualcomm's AI Engine Direct SDK in QNN_SDK_ROOT"),
        (("--backend", "mediatek"), 1, "expected MediaTek's NeuroPilot Express SDK"),
        (("--embedding", "5"), 2, "--embedding: expected 4 or 8, got 5"),
    ):
        assert run("export", packed, "--to", "executorch", "-o", tmp_path / "out", *options) == code
        assert message in one_line(capsys)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "options"), [("llama31", ()), ("llama32", ("--method", "spinquant", "--set", "spinquant.steps=0"))]
)
def test_a_static_program_computes_what_the_engine_does(tmp_path: Path, family: str, options: Any) -> None:
    """A token at a time, in plain operators, R4 among them."""
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401

    packed = pack_by_command(tmp_path, family, *options)
    source, passed = PackedModel(packed), watch(llamita.load(packed, kv_dtype="f32"), IDS)
    program = make_program(source, 64, is_static=True)
    with guided(modules_of(program), source, passed):
        for i, token in enumerate(IDS):
            program(torch.tensor([[token]]), torch.tensor([i]))


def test_a_program_with_float_activations_is_the_float_model(tmp_path: Path) -> None:
    """As Core ML and others get it: the weights multiplied out, and nothing rounded."""
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401

    from llamita.models.dequantized import DequantizedSource
    from llamita.models.names import expected_tensors

    packed = PackedModel(pack_by_command(tmp_path, "llama31"))
    program, floats = make_program(packed, 64, is_static=True, activations=None), DequantizedSource(packed)
    model = make_checkpoint(tmp_path / "floats", "llama31", dtype="F32")
    values = {}
    for name, shape in expected_tensors(packed.config).items():
        is_vector = len(shape) == 1
        values[name] = np.array(floats.vector(name) if is_vector else floats.weight(name[: -len(".weight")]))
    replace_tensors(model, values, "F32")
    with torch.no_grad():
        rows = [program(torch.tensor([[token]]), torch.tensor([i])) for i, token in enumerate(IDS)]
        found = torch.cat(rows)
    expected = llamita.load(model, kv_dtype="f32").logits(IDS)
    assert np.abs(found.numpy() - expected).max() < 1e-3 * np.std(expected)


@pytest.mark.parametrize(("backend", "delegate"), [("vulkan", "VulkanBackend"), ("coreml", "CoreMLBackend")])
def test_other_backends_take_the_whole_model_but_its_embedding(
    tmp_path: Path, capsys: Any, backend: str, delegate: str
) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    packed = pack_by_command(tmp_path)
    capsys.readouterr()
    arguments = ("export", packed, "--to", "executorch", "--backend", backend, "--context", "64")
    assert run(*arguments, "-o", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"not run: the runtime of {backend} is on the device"
    assert "WARNING" not in shown.err
    program = deserialize_pte_binary((tmp_path / "out" / "model.pte").read_bytes()).program
    forward = next(plan for plan in program.execution_plan if plan.name == "forward")
    assert [one.id for one in forward.delegates] == [delegate]
    assert {one.name for one in forward.operators} <= {"quantized_decomposed::embedding_byte", "aten::copy_"}
    guide = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "itself has not run" in guide
    assert ("takes one token at a time" in guide) == (backend == "coreml")
