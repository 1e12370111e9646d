"""FP8 checkpoints in every form, read as float models to the bit; what is wrong with one, in one line."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from fp8_models import BLOCK, FORMS, as_fp8, write_mixed
from tiny import SMALL, make_checkpoint

import llamita
from llamita.bench.plan import Machine, describe, estimate_all
from llamita.commands.inspect import facts
from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.imports.detect import detect_format
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import expected_tensors, linear_names, table_names
from llamita.models.weights import check_finite
from llamita.numerics.affine import to_f32
from llamita.numerics.float8 import FLOAT8, widen
from llamita.numerics.scheme import make_scheme
from llamita.quantize.rounded import RoundedSource

torch = pytest.importorskip("torch", reason="it has the types of FP8")
Stored = dict[str, tuple[str, np.ndarray]]
LAYER = "model.layers.0.self_attn.q_proj"


def fp8(directory: Path, form: str, family: str = "llama3", **options: Any) -> Path:
    """A tiny checkpoint in a form of FP8."""
    return as_fp8(make_checkpoint(directory / "float", family), directory / "fp8", form, **options)


def rewrite(directory: Path, change: Any) -> None:
    """Change the tensors of a checkpoint of one file, given as name to (dtype, values)."""
    path = directory / "model.safetensors"
    file = TensorFile(path)
    tensors: Stored = {name: (info.dtype, file.read(name).copy()) for name, info in file.tensors.items()}
    file.close()
    change(tensors)
    path.unlink()
    write_mixed(path, tensors)


def set_quantization(directory: Path, change: Any) -> None:
    """Change the quantization_config."""
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def assert_same(directory: Path, twin: Path) -> None:
    """Every tensor is that of the twin in F32, to the bit."""
    found, expected = Checkpoint(directory), Checkpoint(twin)
    assert found.hf_config == expected.hf_config
    for tensor, shape in expected_tensors(expected.config).items():
        assert found.info(tensor).shape == shape
        if len(shape) == 1:
            np.testing.assert_array_equal(found.vector(tensor), expected.vector(tensor), err_msg=tensor)
            continue
        values = found.weight(tensor.removesuffix(".weight"))
        dtype = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}[found.info(tensor).dtype]
        assert values.dtype == dtype
        np.testing.assert_array_equal(to_f32(values), expected.weight(tensor.removesuffix(".weight")), err_msg=tensor)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_code_has_the_value_that_torch_gives_it(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    expected = torch.from_numpy(codes.copy()).view(kind).float().numpy()
    found = widen(codes, dtype)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(found)], np.signbit(expected)[~np.isnan(expected)])


def test_wide_and_tall_matrices_are_widened_piece_by_piece() -> None:
    rng = np.random.default_rng(0)
    for shape, block in (((2000, 300), (7, 11)), ((3, 300_000), (2, 128)), ((700, 1), (100, 5))):
        codes = rng.integers(0, 0x7F, shape, np.uint8)
        scales = rng.random((-(-shape[0] // block[0]), -(-shape[1] // block[1])), np.float32)
        rows, columns = np.indices(shape)
        expected = widen(codes, "F8_E4M3") * scales[rows // block[0], columns // block[1]]
        np.testing.assert_array_equal(widen(codes, "F8_E4M3", scales, block), expected)
        np.testing.assert_array_equal(widen(codes[2:], "F8_E4M3", scales, block, 2), expected[2:])


@pytest.mark.parametrize("scales", ["F32", "BF16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_to_the_bit(tmp_path: Path, form: str, scales: str) -> None:
    directory = fp8(tmp_path, form, scales=scales)
    assert_same(directory, tmp_path / "fp8-twin")
    source = Checkpoint(directory)
    assert "quantization_config" not in source.hf_config
    assert source.info(f"{LAYER}.weight").dtype == "F32"
    assert source.info("model.norm.weight").dtype == ("F32" if form == "cast" else "BF16")
    assert detect_format(directory) is None


@pytest.mark.parametrize("form", ["ct block", "fp8 tensor", "cast"])
def test_e5m2_and_shards(tmp_path: Path, form: str) -> None:
    assert_same(fp8(tmp_path, form, dtype="F8_E5M2", shards=3), tmp_path / "fp8-twin")


@pytest.mark.parametrize("family", ["phi3", "granite", "granite, untied", "mllama", "qwen3"])
@pytest.mark.parametrize("form", ["ct tensor", "ct channel", "fp8 block", "cast"])
def test_families_with_a_layout_of_their_own(tmp_path: Path, family: str, form: str) -> None:
    """Rows of fused matrices, factors and other names, each together with scales; 48 rows of a block span two parts."""
    pytest.importorskip("transformers", reason="its classes make the families")
    from families import make_family

    as_fp8(make_family(tmp_path / "float", family), tmp_path / "fp8", form)
    assert_same(tmp_path / "fp8", tmp_path / "fp8-twin")


def test_two_strategies_and_an_older_way_to_write_blocks(tmp_path: Path) -> None:
    directory = fp8(tmp_path, "ct block")

    def change(settings: dict[str, Any]) -> None:
        group = settings["config_groups"]["group_0"]
        other = json.loads(json.dumps(group))
        other["weights"] = {k: v for k, v in other["weights"].items() if k != "block_structure"}
        other["weights"]["strategy"] = "channel"
        group["weights"]["block_structure"] = f"{BLOCK[0]}x{BLOCK[1]}"
        settings["config_groups"]["group_1"] = other
        settings["format"] = "naive-quantized"

    set_quantization(directory, change)
    assert_same(directory, tmp_path / "fp8-twin")


def test_layers_that_stay_float_are_read_as_they_are(tmp_path: Path) -> None:
    directory, kept = fp8(tmp_path, "fbgemm"), "model.layers.1.mlp.down_proj"
    twin = TensorFile(tmp_path / "fp8-twin" / "model.safetensors").read(f"{kept}.weight").copy()

    def change(tensors: Stored) -> None:
        tensors[f"{kept}.weight"] = ("F32", twin)
        del tensors[f"{kept}.weight_scale"]

    rewrite(directory, change)
    assert_same(directory, tmp_path / "fp8-twin")


# ---- other readers -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fp8 block", "fp8 tensor"])
def test_transformers_widens_blocks_to_the_same_values(tmp_path: Path, form: str) -> None:
    """On a CPU it widens to the type that is asked for; its blocks must divide a matrix."""
    transformers = pytest.importorskip("transformers", reason="reads the format")
    pytest.importorskip("accelerate", reason="transformers needs it for FP8")
    directory = fp8(tmp_path, form, block=(32, 64))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    compare_with(loaded.state_dict(), directory)


@pytest.mark.parametrize("form", ["ct tensor", "ct channel", "ct block"])
@pytest.mark.parametrize("scales", ["F32", "BF16"])
def test_compressed_tensors_widens_to_the_same_values(tmp_path: Path, form: str, scales: str) -> None:
    """It multiplies in the scales' type: exact in F32, one rounding to BF16 of value and product otherwise."""
    pytest.importorskip("compressed_tensors", reason="the library of the format")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    directory = fp8(tmp_path, form, scales=scales, block=(32, 64))
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme: Any = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor, file = (
        BaseCompressor.get_value_from_registry("float-quantized"),
        TensorFile(directory / "model.safetensors"),
    )
    source = Checkpoint(directory)
    for name in linear_names(source.config):
        codes = torch.from_numpy(file.read(f"{name}.weight").copy()).view(torch.float8_e4m3fn)
        stored = file.read(f"{name}.weight_scale").copy()
        scale = (
            torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
            if scales == "BF16"
            else torch.from_numpy(stored)
        )
        theirs: Any = compressor.decompress({"weight": codes, "weight_scale": scale}, scheme)["weight"]
        rounding = 2**-8 if scales == "BF16" else 0  # half a step of BF16
        np.testing.assert_allclose(theirs.float().numpy(), source.weight(name), rtol=rounding, atol=0)


def compare_with(state: dict[str, Any], directory: Path) -> None:
    """Every tensor of another reader's model in float32, and ours."""
    source = Checkpoint(directory)
    for tensor, shape in expected_tensors(source.config).items():
        ours = source.vector(tensor) if len(shape) == 1 else to_f32(source.weight(tensor.removesuffix(".weight")))
        np.testing.assert_array_equal(state[tensor].float().numpy(), ours, err_msg=tensor)


# ---- what is refused -----------------------------------------------------------------------------


def drop_scale(tensors: Stored) -> None:
    tensors.pop(f"{LAYER}.weight_scale")


def set_scale(dtype: str, values: Any) -> Any:
    return lambda tensors: tensors.update({f"{LAYER}.weight_scale": (dtype, np.array(values))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scale, f"{LAYER}.weight_scale: expected by config.json, missing"),
        (set_scale("F32", np.ones((64, 1), np.float32)), "shape: expected (128, 1) or (128,), got (64, 1)"),
        (set_scale("I8", np.ones((128, 1), np.int8)), "weight_scale: dtype: expected one of BF16, F16, F32, got I8"),
        (lambda t: t.update({"model.norm.weight_scale": ("F32", np.ones(1, np.float32))}), "weight_scale: unexpected"),
        (lambda t: t.update({"model.norm.weight": ("F8_E4M3", np.ones(128, np.uint8))}), "dtype: expected one of BF16"),
        (lambda t: t.update({f"{LAYER}.weight": ("F32", np.ones((128, 128), np.float32))}), "weight_scale: unexpected"),
        (lambda t: t.update({f"{LAYER}.weight": ("F8_E4M3", np.ones((64, 256), np.uint8))}), "weight_scale: shape"),
        (lambda t: t.update({f"{LAYER}.weight": ("F8_E4M3", np.ones(128 * 128, np.uint8))}), "unexpected"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_named(tmp_path: Path, capsys: Any, change: Any, message: str) -> None:
    directory = fp8(tmp_path, "ct channel")
    rewrite(directory, change)
    assert run("inspect", directory) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_cannot_be_are_named(tmp_path: Path, value: float) -> None:
    directory = fp8(tmp_path, "ct tensor")
    rewrite(directory, set_scale("F32", np.full(1, value, np.float32)))
    with pytest.raises(InputError, match=f"{LAYER}.weight_scale: expected finite scales, none below 0"):
        Checkpoint(directory).weight(LAYER)


def test_a_code_that_is_no_number_is_found_with_its_place(tmp_path: Path, capsys: Any) -> None:
    directory = fp8(tmp_path, "fp8 block")

    def change(tensors: Stored) -> None:
        tensors[f"{LAYER}.weight"][1][70, 5] = 0xFF

    rewrite(directory, change)
    with pytest.raises(InputError, match=r"NaN or infinity at row 70, column 5"):
        check_finite(LAYER, Checkpoint(directory).weight(LAYER))
    assert run("quantize", directory, "-o", tmp_path / "out") == 2
    assert "row 70, column 5" in capsys.readouterr().err


def test_products_beyond_float32_are_found_without_a_warning(tmp_path: Path) -> None:
    directory = fp8(tmp_path, "ct tensor")
    rewrite(directory, set_scale("F32", np.full(1, 3e38, np.float32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = Checkpoint(directory).weight(LAYER)
    with pytest.raises(InputError, match="NaN or infinity"):
        check_finite(LAYER, weight)


def _weights(**changes: Any) -> Any:
    return lambda settings: settings["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("ct tensor", _weights(strategy="group"), "strategy: expected tensor or channel or block, got 'group'"),
        ("ct tensor", _weights(strategy=[]), "strategy: expected tensor or channel or block"),
        ("ct tensor", _weights(type="int"), "type: expected float, got 'int'"),
        ("ct tensor", _weights(num_bits=4), "num_bits: expected 8, got 4"),
        ("ct tensor", _weights(symmetric=False), "symmetric: expected True, got False"),
        ("ct tensor", _weights(strategy="channel"), "weight_scale: shape: expected (64, 1)"),
        ("ct block", _weights(block_structure=None), "block_structure: expected two sizes"),
        ("ct block", _weights(block_structure=[0, 32]), "block_structure: expected two sizes"),
        ("ct block", _weights(block_structure=[16, 32]), "weight_scale: shape"),
        ("ct tensor", lambda s: s.update(config_groups=[]), "config_groups: expected groups by name"),
        ("ct tensor", lambda s: s.update(config_groups={"a": 1}), "weights: expected settings"),
        ("ct tensor", lambda s: s.update(transform_config={"a": 1}), "expected scaled weights alone"),
        ("ct tensor", lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}), "expected scaled weights"),
        ("fp8 block", lambda s: s.update(weight_block_size=[48]), "weight_block_size: expected two sizes"),
        ("fp8 block", lambda s: s.update(weight_block_size=None), "weight_scale_inv: shape"),
        ("fp8 block", lambda s: s.update(quant_method="mxfp8"), "expected a float model, got 'mxfp8'"),
    ],
)
def test_settings_that_are_not_known_are_named(
    tmp_path: Path, capsys: Any, form: str, change: Any, message: str
) -> None:
    directory = as_fp8(make_checkpoint(tmp_path / "float", "llama3", **SMALL), tmp_path / "fp8", form)
    set_quantization(directory, change)
    assert run("inspect", directory) == 2
    assert message in one_line(capsys)


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ct channel", "fp8 block", "fbgemm", "cast"])
def test_commands_take_it_as_a_float_model(tmp_path: Path, capsys: Any, form: str) -> None:
    """Sizes are those of the files; the codes and scales of the packed model are those of the twin in F32."""
    directory = fp8(tmp_path, form, "llama32")
    assert run("inspect", directory, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    stored = {
        name: info.stop - info.start for name, info in TensorFile(directory / "model.safetensors").tensors.items()
    }
    assert told["tensor_bytes"] == sum(stored.values())
    assert told["bytes_by_dtype"]["F8_E4M3"] == sum(size for name, size in stored.items() if _is_code(name, form))
    needed = sum(size for name, size in stored.items() if "input_scale" not in name and "k_scale" not in name)
    assert run("quantize", directory, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["source_bytes"] == needed
    for name in ("fp8", "fp8-twin"):
        assert run("quantize", tmp_path / name, "-o", tmp_path / f"{name}-packed", "--json") == 0
        capsys.readouterr()
    made, other = tmp_path / "fp8-packed", tmp_path / "fp8-twin-packed"
    files = TensorFile(made / "model.safetensors"), TensorFile(other / "model.safetensors")
    for name in linear_names(Checkpoint(directory).config):
        for part in ("weight_packed", "weight_scale"):
            np.testing.assert_array_equal(files[0].read(f"{name}.{part}"), files[1].read(f"{name}.{part}"))
    assert planned["tensor_bytes"] == sum(info.stop - info.start for info in files[0].tensors.values())
    assert "quantization_config" not in Checkpoint(directory).hf_config


def _is_code(name: str, form: str) -> bool:
    return form == "cast" or name.endswith("proj.weight")


def test_it_runs_and_can_be_rounded_on_the_way(tmp_path: Path) -> None:
    directory = fp8(tmp_path, "ct block")
    prompts = [[256, *range(20)]]
    for scheme in (None, "llama3.2"):
        texts = [llamita.load(path, scheme=scheme).generate_many(prompts, max_tokens=8, temperature=0.0)
                 for path in (directory, tmp_path / "fp8-twin")]  # fmt: skip
        assert [t.token_ids for t in texts[0]] == [t.token_ids for t in texts[1]]


def test_import_says_what_it_is(tmp_path: Path, capsys: Any) -> None:
    directory = fp8(tmp_path, "ct channel")
    assert run("import", directory, "-o", tmp_path / "out") == 2
    assert "a float checkpoint in FP8; every command takes it as it is" in one_line(capsys)
    set_quantization(directory, _weights(num_bits=4))
    assert run("import", directory, "-o", tmp_path / "out") == 2
    assert "num_bits: expected 8, got 4" in one_line(capsys)
    set_quantization(directory, lambda s: s.update(format="naive-quantized"))
    set_quantization(directory, _weights(type="int"))
    assert detect_format(directory) == "compressed-tensors"  # a byte for an integer: the importer's


@pytest.mark.parametrize("form", ["fp8 block", "ct tensor", "cast"])
def test_plan_counts_what_the_files_and_memory_hold(tmp_path: Path, form: str) -> None:
    directory = fp8(tmp_path, form)
    machine = Machine(1e10, 1e10, 2**40, 2**40, 1, 0)
    (small,), (large,) = (estimate_all(describe(str(path)), machine, []) for path in (directory, tmp_path / "fp8-twin"))
    source = Checkpoint(directory)
    assert small.tensor_bytes == source.stored_bytes() < large.tensor_bytes / 2
    linear, tables = (sum(r * c for r, c in f(source.config).values()) for f in (linear_names, table_names))
    made = linear + tables if form == "cast" else linear
    assert source.made_bytes() == 4 * made
    others = 0 if form == "cast" else tables + 5 * 128  # the norms; both are BF16, two bytes less a value
    assert large.memory[512] - small.memory[512] == 2 * others
    if form != "cast":  # the same from config.json alone, but for the scales
        config = shutil.copy(directory / "config.json", tmp_path)
        (alone,) = estimate_all(describe(str(config)), machine, [])
        assert alone.memory == small.memory
        assert small.tensor_bytes * 0.95 < alone.tensor_bytes <= small.tensor_bytes


def test_finetune_reads_it(tmp_path: Path) -> None:
    """transformers' model for training, made from either."""
    pytest.importorskip("transformers", reason="training uses its classes")
    from llamita.train.load import load_float

    directory = fp8(tmp_path, "ct channel")
    models = [load_float(Checkpoint(path)).state_dict() for path in (directory, tmp_path / "fp8-twin")]
    for name, values in models[0].items():
        assert torch.equal(values, models[1][name]), name


def test_rounding_and_facts_go_through_the_layout(tmp_path: Path) -> None:
    source = Checkpoint(fp8(tmp_path, "autofp8"))
    assert facts(source)["files"] == ["model.safetensors"]
    rounded = RoundedSource(source, make_scheme("arm"))
    np.testing.assert_array_equal(rounded.weight("lm_head"), source.weight("lm_head"))
