"""Schemes: presets, changed presets, refusals."""

import pytest

from llamita.errors import InputError
from llamita.numerics.scheme import PRESETS, QuantScheme, fitting_group_size, make_scheme


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_keeps_its_name(preset: str) -> None:
    assert make_scheme(preset) == PRESETS[preset]
    assert make_scheme(preset).name == preset


def test_published_presets() -> None:
    assert make_scheme("arm") == QuantScheme("arm", 128, "torchao", "float32", None)
    assert make_scheme("arm", 256).name == "arm"
    assert make_scheme("arm", 256).group_size == 256
    assert (make_scheme("llama3.2").group_size, make_scheme("llama3.2").table_bits) == (32, 8)


def test_changed_preset_is_custom() -> None:
    changed = make_scheme("llama3.2", group_size=64)
    assert (changed.name, changed.group_size, changed.table_bits) == ("custom", 64, 8)
    assert make_scheme("arm", 64).name == "custom"


def test_search_moves_arm_to_the_bf16_grid() -> None:
    assert make_scheme("arm", scale_rule="search").scale_dtype == "bfloat16"
    assert make_scheme("arm", scale_rule="torchao").scale_dtype == "float32"


def test_dict_round_trip() -> None:
    scheme = make_scheme("llamita")
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"group_size": 48}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"scale_rule": "best"}, "scale_rule"),
        ({"scale_dtype": "float16"}, "scale_dtype"),
        ({"table_bits": 4}, "table_bits"),
        ({"scale_rule": "search", "scale_dtype": "float32"}, "scale_dtype"),
        ({"extra": 1}, "extra"),
    ],
)
def test_refuses(change: dict[str, object], word: str) -> None:
    values = make_scheme("arm").to_dict() | change
    with pytest.raises(InputError, match=word):
        QuantScheme.from_dict(values)


@pytest.mark.parametrize(
    ("columns", "most", "expected"),
    [(576, 128, 64), (1536, 128, 128), (1536, 256, 256), (960, 256, 64), (352, 128, 32), (352, 32, 32), (512, 64, 64),
     (96, 64, 32), (208, 256, None), (16, 32, None)],
)  # fmt: skip
def test_the_largest_group_size_that_divides(columns: int, most: int, expected: int | None) -> None:
    assert fitting_group_size(columns, most) == expected


@pytest.mark.parametrize("arguments", [("nope",), ("arm", 100), ("arm", 128, "nope")])
def test_options_are_checked(arguments: tuple) -> None:
    with pytest.raises(InputError, match="expected one of"):
        make_scheme(*arguments)
