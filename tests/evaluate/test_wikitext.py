"""WikiText's test split: the hub's 62 pages and the literature's text, from the original file."""

import re
from pathlib import Path

import pytest
from original_wikitext import original_wikitext
from places import DATA

from llamita.errors import InputError
from llamita.evaluate import wikitext

REAL = DATA / "wikitext2" / "wiki.test.raw"
needs_file = pytest.mark.skipif(not REAL.exists(), reason="needs wiki.test.raw: set LLAMITA_DATA")

SMALL = """ \n = First page = \n \n Some text @-@ here . \n \n = = Section = = \n \n More .
 \n \n = Second page ( film ) = \n \n = 3 is no title \n \n = = = Deep = = = \n \n End . \n \n"""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The original file; the local one may be a copy without its blank lines."""
    path = tmp_path_factory.mktemp("wikitext") / "wiki.test.raw"
    path.write_bytes(original_wikitext(REAL.read_bytes()))
    return path


@needs_file
def test_real_file_gives_the_pages_of_the_hub(original):
    assert original.stat().st_size == 1_290_590
    found = wikitext.read(original)
    assert found.is_original
    assert found.note == ""
    assert len(found.pages) == wikitext.PAGES == 62
    assert found.pages[0].startswith(" = Robert Boulter = \n \n Robert Boulter is an English film")
    assert found.pages[-1].startswith(" = The Hustler ( film ) = \n \n")
    # Llama 2's published word perplexity 8.7921 and byte perplexity 1.5016 mean 5.3473(4) bytes a word,
    # Mistral's 9.8183 and 1.5329 mean 5.3475(4).
    words = sum(len(re.split(r"\s+", page)) for page in found.pages)
    size = sum(len(page.encode()) for page in found.pages)
    assert (words, size) == (241_335, 1_290_527)


@needs_file
def test_line_ends_of_every_system_give_the_same_text(original, tmp_path):
    (tmp_path / "crlf").write_bytes(original.read_bytes().replace(b"\n", b"\r\n"))
    assert wikitext.read(tmp_path / "crlf") == wikitext.read(original)


@needs_file
def test_pages_of_the_hub_give_the_same_text(original):
    from_file = wikitext.read(original)
    assert wikitext.from_pages(from_file.pages, "hub") == from_file


@needs_file
def test_another_text_is_reported(original, tmp_path):
    lines = original.read_bytes().splitlines(keepends=True)
    copies = {
        "changed": original.read_bytes().replace(b"Robert", b"Rupert"),
        "stripped": b"".join(line for line in lines if line.strip()),
    }
    for name, copy in copies.items():
        (tmp_path / name).write_bytes(copy)
        found = wikitext.read(tmp_path / name)
        assert not found.is_original
        assert "not WikiText-2's test split" in found.note
        assert "published ones need the original file, or --tasks wikitext" in found.note


def test_small_file_is_cut_at_titles_alone(tmp_path):
    path = tmp_path / "small.raw"
    path.write_text(SMALL, "utf-8")
    found = wikitext.read(path)
    assert [page.split("\n")[0] for page in found.pages] == [" = First page = ", " = Second page ( film ) = "]
    assert found.pages[0].endswith(" More .\n \n ")  # the blank lines before a title end the page before it
    assert "".join(SMALL.split()) == "".join("".join(found.pages).split())
    assert not found.is_original
    assert "2 pages" in found.note


def test_literature_text_joins_rows_by_blank_lines():
    found = wikitext.parse(SMALL, "small")
    assert found.text.startswith("\n\n = First page = \n\n\n\n\n Some text @-@ here . \n\n\n")


@pytest.mark.parametrize("content", [b"", b" \n\n \r\n"])
def test_refuses_nothing(tmp_path, content):
    path = tmp_path / "empty"
    path.write_bytes(content)
    with pytest.raises(InputError, match="empty file"):
        wikitext.read(path)


def test_refuses_what_is_not_text(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="stray byte at 3"):
        wikitext.read(path)
    with pytest.raises(InputError, match=r"expected the file wiki\.test\.raw, got none"):
        wikitext.read(tmp_path / "missing")
