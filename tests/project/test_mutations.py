"""The table of tools/mutations.py fits the tree. That tests fail for each entry takes minutes: by hand."""

import importlib.util
from pathlib import Path

import pytest
from places import ROOT

SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tools" / "mutations.py")
assert SPEC
assert SPEC.loader
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize(("file", "old", "new", "what"), mutations.MUTATIONS, ids=lambda value: value[:40])
def test_the_text_to_change_occurs_once(file: str, old: str, new: str, what: str) -> None:
    assert (ROOT / file).read_text("utf-8").count(old) == 1, f"{what}: expected once in {file}: {old}"
    assert new != old


def test_what_is_run_first_exists() -> None:
    assert all((ROOT / "tests" / name).is_file() for name in mutations.FIRST)
    assert Path(mutations.NOT_RUN).name == Path(__file__).name
