"""Meta's own checkpoints: the same model as its Hugging Face format, one file or several, and nothing run."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from foreign_models import as_meta, sentencepiece_model, write_ranks
from tiny import llama3_rope, make_checkpoint

import llamita
from llamita.errors import InputError
from llamita.imports.convert import convert
from llamita.imports.open import resolve
from llamita.imports.tokenizers import Converted, convert_tokenizer
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import expected_tensors
from llamita.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="Meta's files are read by torch.load")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama31", vocab_size=514, rope_scaling=llama3_rope(8.0))


@pytest.mark.parametrize(("parts", "cuts_columns"), [(1, False), (2, False), (2, True)])
def test_it_is_the_same_model(model: Path, tmp_path: Path, parts: int, cuts_columns: bool) -> None:
    source = as_meta(model, tmp_path / "meta", parts, cuts_columns)
    assert run("import", source, "-o", tmp_path / "out") == 0
    made, given = Checkpoint(tmp_path / "out"), Checkpoint(model)
    assert made.config.rope == given.config.rope
    assert made.config.tied == given.config.tied is False
    for tensor, shape in expected_tensors(given.config).items():
        module = tensor.removesuffix(".weight")
        read = [one.stored_vector(tensor) if len(shape) == 1 else one.weight(module) for one in (made, given)]
        np.testing.assert_array_equal(read[0], read[1], err_msg=tensor)
    ids = [3, 1, 4, 1, 5]
    np.testing.assert_array_equal(llamita.load(tmp_path / "out").logits(ids), llamita.load(model).logits(ids))


def test_every_command_takes_it_and_converts_it_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    source = as_meta(model, tmp_path / "meta")
    found = resolve(source)
    files = {path: path.stat().st_mtime_ns for path in found.iterdir()}
    assert resolve(source) == found
    assert {path: path.stat().st_mtime_ns for path in found.iterdir()} == files
    assert run("quantize", source, "-o", tmp_path / "packed") == 0
    assert run("generate", tmp_path / "packed", "--prompt", "ab", "--max-tokens", "2") == 0
    os.utime(source / "params.json", ns=(1, 1))
    assert resolve(source) != found  # changed: converted anew


def test_its_tokenizer_is_that_of_its_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    assert convert_tokenizer(tmp_path, tmp_path) == Converted(258 + 256, 258, (259, 266, 267), True)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("abé") == [258, 256, *"é".encode()]
    assert tokenizer.decode(tokenizer.encode("abé", add_bos=False)) == "abé"
    assert tokenizer.eos_token == "<|eot_id|>"


class Evil:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil-was-here",)


def test_nothing_in_a_file_is_run(model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = as_meta(model, tmp_path / "meta")
    torch.save({"norm.weight": Evil()}, source / "consolidated.00.pth")
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "expected a file of torch.save with tensors alone" in one_line(capsys)
    (source / "consolidated.00.pth").write_bytes(b"cposix\nsystem\n(S'touch evil-was-here'\ntR.")
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "consolidated.00.pth: expected a file of torch.save" in one_line(capsys)
    assert not (tmp_path / "evil-was-here").exists()
    assert not (tmp_path / "out").exists()


def test_what_is_damaged_is_one_typed_error(model: Path, tmp_path: Path) -> None:
    """Bytes changed and cut in every file; what is read nevertheless is a whole checkpoint."""
    source, random = as_meta(model, tmp_path / "meta"), np.random.default_rng(0)
    refused = 0
    for number in range(120):
        name = ("consolidated.00.pth", "params.json", "tokenizer.model")[number % 3]
        good = (source / name).read_bytes()
        data = bytearray(good)
        for _ in range(4):
            data[int(random.integers(len(data)))] = int(random.integers(256))
        (source / name).write_bytes(data[: int(random.integers(len(data)))] if number % 2 else data)
        out = tmp_path / f"out{number}"
        try:
            code = run("import", source, "-o", out)
        finally:
            (source / name).write_bytes(good)
        refused += code == 2
        assert code in (0, 2)
        assert out.exists() == (code == 0)
    assert refused > 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "wide"}, "params.json: dim: expected a whole number"),
        ({"dim": 32}, "of 1 parts, got"),
        ({"n_layers": 3}, "expected layers.2."),
        ({"norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_scale_factor": "x"}, "factor"),
        ({"sliding_window": 4096}, "params.json: 'sliding_window': expected Llama's keys"),
    ],
)
def test_what_does_not_fit_is_refused(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = as_meta(model, tmp_path / "meta", **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.attention.wq.bias", "ones", "expected a Llama's tensors alone"),
        ("norm.weight", "double", "expected a plain tensor of floats"),
        ("norm.weight", "wide", "expected a plain tensor of floats"),
        ("norm.weight", "sparse", "expected a plain tensor of floats"),
    ],
)
def test_tensors_that_would_be_lost_or_grow_are_refused(
    model: Path, tmp_path: Path, name: str, tensor: str, message: str
) -> None:
    source = as_meta(model, tmp_path / "meta")
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    made = {"ones": torch.ones(64).bfloat16(), "double": torch.ones(64).double(),
            "wide": torch.ones(1).bfloat16().expand(64), "sparse": torch.ones(64).to_sparse()}  # fmt: skip
    torch.save(state | {name: made[tensor]}, source / "consolidated.00.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out")


def test_an_archive_that_grows_is_refused(model: Path, tmp_path: Path) -> None:
    source = as_meta(model, tmp_path / "meta")
    path = source / "consolidated.00.pth"
    with zipfile.ZipFile(path) as given:
        members = {one.filename: given.read(one) for one in given.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as grown:
        for name, data in members.items():
            grown.writestr(name, data)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="got something that was compressed"):
        convert(source, tmp_path / "out")


def test_what_import_made_it_replaces(model: Path, tmp_path: Path) -> None:
    source = as_meta(model, tmp_path / "meta")
    (source / "tokenizer_config.json").write_text("{}")  # Meta's releases on the hub have one, too
    assert run("import", source, "-o", tmp_path / "out") == 0
    assert run("import", source, "-o", tmp_path / "out", "--overwrite") == 0


def test_each_mistake_is_one_line(model: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, message in (
        ((model, "-o", tmp_path / "out"), "got a float checkpoint; try llamita quantize"),
        (
            (tmp_path / "none", "-o", tmp_path / "out"),
            "expected Meta's consolidated.*.pth with params.json, pytorch_model.bin",
        ),
        ((model,), "--out: expected the directory to make"),
    ):
        assert run("import", *arguments) == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize(("spec", "message"), [(b"", "a Unigram model"), (b"\x18\x04", "kind 4"), (b"\x18\x02", "")])
def test_other_kinds_of_sentencepiece_are_refused(tmp_path: Path, spec: bytes, message: str) -> None:
    model = sentencepiece_model(300) + b"\x12" + bytes([len(spec)]) + spec  # trainer_spec, in it model_type
    (tmp_path / "tokenizer.model").write_bytes(model)
    if message:
        with pytest.raises(InputError, match=f"expected SentencePiece's BPE, as Llama 2's, got {message}"):
            convert_tokenizer(tmp_path, tmp_path)
    else:
        assert convert_tokenizer(tmp_path, tmp_path).tokens == 300


def test_norms_of_integers_are_refused(model: Path, tmp_path: Path) -> None:
    source = as_meta(model, tmp_path / "meta")
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    torch.save(state | {"norm.weight": state["norm.weight"].to(torch.int8)}, source / "consolidated.00.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"norm\.weight: expected floats, got torch\.int8"):
        convert(source, tmp_path / "out")
