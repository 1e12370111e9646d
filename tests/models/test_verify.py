"""`llamita verify`: every flipped bit, missing, extra or truncated file is found and named."""

import json
import random
import shutil
from pathlib import Path

import pytest
from packed_models import pack

from llamita import cli
from llamita.errors import InputError
from llamita.models.verify import verify


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("verify"), family="llama3", shard_bytes=100_000)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_was_written_is_whole(packed: Path) -> None:
    report = verify(packed)
    assert report.problems == []
    assert report.files == len(list(packed.iterdir()))
    assert report.bytes == sum(path.stat().st_size for path in packed.iterdir())


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(copy: Path) -> None:
    rng = random.Random(0)
    for path in sorted(copy.iterdir()):
        before = path.read_bytes()
        bits = [0, 8 * len(before) - 1, *(rng.randrange(8 * len(before)) for _ in range(6))]
        for bit in bits:
            flip(path, bit)
            problems = verify(copy).problems
            assert problems, (path, bit)
            assert any(path.name in problem for problem in problems), (path, bit, problems)
            path.write_bytes(before)


def test_every_bit_of_the_first_lines_of_llamita_json_counts(copy: Path) -> None:
    path = copy / "llamita.json"
    before = path.read_bytes()
    for bit in range(0, 8 * 130, 3):  # the brace, the line with the hash, and some of what follows
        flip(path, bit)
        assert verify(copy).problems, bit
        path.write_bytes(before)


def test_missing_truncated_and_extra_files_are_named(copy: Path) -> None:
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    (copy / "extra.py").touch()
    (copy / "folder").mkdir()
    problems = verify(copy).problems
    assert [p.split(":")[0] for p in problems] == [first.name, second.name, "extra.py", "folder"]
    assert "missing" in problems[0]
    assert "bytes" in problems[1]


def test_a_file_replaced_by_a_link_or_a_folder_is_found(copy: Path, packed: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to(packed / "config.json")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    assert len(verify(copy).problems) == 2


def test_what_the_hub_adds_is_no_problem(copy: Path) -> None:
    (copy / ".gitattributes").touch()
    (copy / ".cache").mkdir()
    assert verify(copy).problems == []


def test_a_directory_of_another_kind_is_refused(packed: Path) -> None:
    with pytest.raises(InputError, match=r"llamita\.json"):
        verify(packed.parent / "src")


def test_the_command_says_so_with_its_exit_code(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verify", str(copy), "--json"])
    assert json.loads(capsys.readouterr().out)["ok"] is True
    flip(copy / "README.md", 100)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(copy)])
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "README.md" in captured.err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(copy), "--json"])
    assert exit_.value.code == 1
    assert json.loads(capsys.readouterr().out)["problems"]
