"""The page of families: it has every family and every column, and no failure."""

import re
import sys

from families import FAMILIES
from places import ROOT

from llamita.models.families import FAMILIES as KNOWN
from llamita.models.families import REWRITTEN

sys.path.insert(0, str(ROOT / "tools"))
import families_table


def test_the_table_has_every_family_and_column() -> None:
    text = families_table.PAGE.read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.split(families_table.BEGIN)[1].splitlines() if "|" in line]
    header, _, *lines = rows
    assert header == ["family", *families_table.COLUMNS]
    assert [line[0] for line in lines] == list(FAMILIES)
    for line in lines:
        assert len(line) == len(header)
        assert set(line[1:]) <= {"yes", "refused", families_table.ABSENT}
        assert line.count("refused") == sum(family == line[0] for family, _ in families_table.REFUSED)


def test_every_family_is_in_the_gallery_and_on_the_page() -> None:
    known = set(KNOWN) | set(REWRITTEN) - {"mllama_text_model"}
    assert {model_type for model_type, _ in FAMILIES.values()} == known
    text = families_table.PAGE.read_text("utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M)) - {"model_type"} == known


def test_every_test_of_the_gallery_is_a_column_or_general() -> None:
    source = (ROOT / "tests/gallery/test_families.py").read_text("utf-8")
    tests = set(re.findall(r"^def (test_\w+)\(", source, flags=re.M))
    assert {test for test, _ in families_table.COLUMNS.values()} <= tests


def test_the_forward_pass_knows_no_family() -> None:
    """It asks for values of the configuration; see `docs/design.md`, decision 56."""
    for path in sorted((ROOT / "src/llamita/engine").glob("*.py")):
        text = path.read_text("utf-8")
        assert "family" not in text, path.name
        assert not set(re.findall(r"\w+", text)) & (set(KNOWN) | set(REWRITTEN)) - {"llama"}, path.name
