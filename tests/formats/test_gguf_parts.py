"""A model in several GGUF files: whichever part is named, and parts that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import write_parts, write_small_gguf

from llamita.errors import InputError
from llamita.formats.gguf import GgufFile, write_gguf
from llamita.formats.gguf_parts import GgufModel, parts_of
from llamita.imports.detect import files_of, gguf_of


def test_any_part_and_the_directory_name_the_model(tmp_path: Path) -> None:
    paths = write_parts(write_small_gguf(tmp_path / "whole.gguf"), tmp_path / "parts")
    whole = GgufFile(tmp_path / "whole.gguf")
    for path in paths:
        model = GgufModel(path)
        assert model.path == paths[0]
        assert model.values["d"] == "text"
        assert set(model.tensors) == set(whole.tensors)
        for name in whole.tensors:
            np.testing.assert_array_equal(model.read(name), whole.read(name))
    assert gguf_of(tmp_path / "parts") == paths[0]
    assert files_of(tmp_path / "parts") == files_of(paths[2]) == paths
    assert parts_of(tmp_path / "whole.gguf") == [tmp_path / "whole.gguf"]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(write_small_gguf(tmp_path / "whole.gguf"), tmp_path / "parts")
    paths[1].unlink()
    with pytest.raises(InputError, match=r"expected all 3 parts of the model, got none named model-00002-of-00003"):
        GgufModel(paths[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.no": 0}, r"split.no: expected 1 of 3 files, got 0 of 3"),
        ({"split.count": 4}, r"split.no: expected 0 of 3 files, got 0 of 4"),
        ({"split.tensors.count": 9}, r"split.tensors.count: expected 9, got "),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    paths = write_parts(write_small_gguf(tmp_path / "whole.gguf"), tmp_path / "parts", **changes)
    with pytest.raises(InputError, match=message):
        GgufModel(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = write_parts(write_small_gguf(tmp_path / "whole.gguf"), tmp_path / "parts")
    second = GgufFile(paths[1])
    tensors = {name: (tensor.kind, tensor.shape) for name, tensor in second.tensors.items()}
    data = [(name, second.read(name)) for name in tensors]
    write_gguf(paths[0], {**GgufFile(paths[0]).values}, tensors, iter(data))
    with pytest.raises(InputError, match="expected in one file, got in two"):
        GgufModel(paths[0])
