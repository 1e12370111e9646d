"""Round to nearest: the codes of the specification, whatever the size of the pieces."""

from pathlib import Path

import numpy as np
import pytest
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.methods import rtn
from llamita.models import weights
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import linear_names, table_names
from llamita.numerics.affine import round_weights
from llamita.numerics.scheme import make_scheme

NAME = "model.layers.0.mlp.down_proj"  # (128, 256)


def rounded(source: Checkpoint, name: str, preset: str, scales: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a module, all pieces together."""
    pieces = list(rtn.rounder(source, make_scheme(preset, None, scales))(name))
    return np.concatenate([p.codes for p in pieces]), np.concatenate([p.scales for p in pieces])


@pytest.mark.parametrize(
    ("preset", "scales", "rule"),
    [
        ("arm", "torchao", "torchao"),
        ("llama3.2", "torchao", "torchao_bf16"),
        ("arm", "search", "search"),
        ("llama3.2", "search", "search"),
    ],
)
def test_codes_and_scales_are_those_of_the_specification(tmp_path: Path, preset: str, scales: str, rule: str) -> None:
    source, scheme = Checkpoint(make_checkpoint(tmp_path)), make_scheme(preset, None, scales)
    modules = dict.fromkeys(linear_names(source.config), (4, scheme.group_size))
    if scheme.table_bits:
        modules |= dict.fromkeys(table_names(source.config), (8, source.config.hidden_size))
    for name, (bits, group_size) in modules.items():
        codes, found = rounded(source, name, preset, scales)
        expected = round_weights(source.weight(name), bits, group_size, rule)
        np.testing.assert_array_equal(codes, expected[0])
        np.testing.assert_array_equal(found, expected[1])


@pytest.mark.parametrize("scales", ["search", "weighted"])
def test_the_size_of_the_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: str) -> None:
    source = Checkpoint(make_checkpoint(tmp_path))
    whole = rounded(source, NAME, "llama3.2", scales)
    for chunk in (1, 1000, 5000):
        monkeypatch.setattr(weights, "_CHUNK", chunk)
        for found, expected in zip(rounded(source, NAME, "llama3.2", scales), whole, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scales", ["torchao", "search", "weighted"])
def test_the_place_of_a_bad_weight_counts_from_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: str
) -> None:
    make_checkpoint(tmp_path, dtype="F32")
    info = TensorFile(tmp_path / "model.safetensors").tensors[f"{NAME}.weight"]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(info.start + 4 * (100 * 256 + 7))
        file.write(np.float32(np.nan).tobytes())
    monkeypatch.setattr(weights, "_CHUNK", 10 * 256)
    with pytest.raises(InputError, match="row 100, column 7"):
        rounded(Checkpoint(tmp_path), NAME, "llama3.2", scales)
