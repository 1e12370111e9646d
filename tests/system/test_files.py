"""Files of JSON: a damaged one is refused in little time."""

import time

import pytest

from llamita.errors import InputError
from llamita.system.files import parse_json


def test_a_key_that_appears_twice_among_many_is_found_at_once() -> None:
    keys = [f'"k{i}": 0' for i in range(100_000)]
    began = time.perf_counter()
    with pytest.raises(InputError, match="'k99999' appears twice"):
        parse_json(f"{{{', '.join([*keys, keys[-1]])}}}".encode(), "x")
    assert time.perf_counter() - began < 5  # comparing every pair takes minutes
