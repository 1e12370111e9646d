"""Write the table of `docs/reference/families.md`: what the tests of the gallery found for each family.

python tools/families_table.py [--report FILE]   (some minutes; FILE is a JUnit report of the gallery's tests)
"""

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/families.md"
TESTS = ROOT / "tests/gallery/test_families.py"
BEGIN, END = "<!-- written by tools/families_table.py -->", "<!-- end -->"
COLUMNS = {  # title: the test, and the other parameters that it has
    "float": ("test_float_logits_are_those_of_transformers", ""),
    "4-bit": ("test_rounded_layers_are_those_of_fake_quantized_ones", ""),
    "equalize": ("test_transforms_keep_the_function", "equalize"),
    "rotations": ("test_transforms_keep_the_function", "equalize+spinquant"),
    "learned, GPTQ, tune": ("test_learned_and_calibrated_methods_make_a_better_model", ""),
    "finetune": ("test_twenty_steps_of_training_lower_the_loss", ""),
    "`executorch`": ("test_executorch_says_the_same", ""),
    "`compressed-tensors`": ("test_checkpoints_of_other_libraries_hold_it", "compressed-tensors"),
    "`torchao`": ("test_checkpoints_of_other_libraries_hold_it", "torchao"),
    "`hf`": ("test_checkpoints_of_other_libraries_hold_it", "hf"),
    "`gguf`": ("test_gguf_there_and_back", ""),
    "its own GGUF": ("test_its_own_gguf_is_read", ""),
}
REFUSED = {("phi3, longrope", "`gguf`"): "refused"}  # the test checks the refusal
ABSENT = "-"  # the table's sign for what llama.cpp has no file of


def families() -> list[str]:
    """Return the names of the families, in the order of the gallery."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    from families import FAMILIES

    return list(FAMILIES)


def outcomes(report: Path) -> dict[tuple[str, str, str], bool]:
    """Return whether each test passed, by test, family and other parameters."""
    found: dict[tuple[str, str, str], bool] = {}
    names = sorted(families(), key=len, reverse=True)
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
        family = next((name for name in names if match and match[2].startswith(name)), None)
        if match is None or family is None:
            continue
        passed = not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        found[match[1], family, match[2][len(family) :].lstrip("-")] = passed
    return found


def table(found: dict[tuple[str, str, str], bool]) -> str:
    """Return the table in Markdown."""
    rows = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for family in families():
        cells = []
        for title, (test, parameter) in COLUMNS.items():
            passed = found.get((test, family, parameter))
            cells.append(ABSENT if passed is None else REFUSED.get((family, title), "yes") if passed else "FAILED")
        rows.append([family, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Run the tests, or read their report, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args().report
    with tempfile.TemporaryDirectory() as directory:
        report = given or Path(directory) / "report.xml"
        if given is None:
            options = ["-q", "-m", "slow or not slow", f"--junitxml={report}"]
            subprocess.run([sys.executable, "-m", "pytest", str(TESTS), *options], cwd=ROOT, check=False)
        made = table(outcomes(report))
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
