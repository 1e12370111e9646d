"""WikiText's test split: the hub's 62 pages and the literature's text, from either copy of the file."""

import re
from dataclasses import replace

import pytest
from places import DATA

from llamita.errors import InputError
from llamita.evaluate import wikitext

REAL = DATA / "wikitext2" / "wiki.test.raw"
needs_file = pytest.mark.skipif(not REAL.exists(), reason="needs wiki.test.raw: set LLAMITA_DATA")

SMALL = """ \n = First page = \n \n Some text @-@ here . \n \n = = Section = = \n \n More .
 \n \n = Second page ( film ) = \n \n = 3 is no title \n \n = = = Deep = = = \n \n End . \n \n"""


@needs_file
def test_real_file_gives_the_pages_of_the_hub():
    found = wikitext.read(REAL)
    assert found.is_original
    assert len(found.pages) == wikitext.PAGES == 62
    assert found.pages[0].startswith(" = Robert Boulter = \n \n Robert Boulter is an English film")
    assert found.pages[-1].startswith(" = The Hustler ( film ) = \n \n")
    # Llama 2's published word perplexity 8.7921 and byte perplexity 1.5016 mean 5.3473(4) bytes a word,
    # Mistral's 9.8183 and 1.5329 mean 5.3475(4).
    words = sum(len(re.split(r"\s+", page)) for page in found.pages)
    size = sum(len(page.encode()) for page in found.pages)
    assert (words, size) == (241_335, 1_290_527)


@needs_file
def test_every_copy_of_the_file_is_the_same_text(tmp_path):
    from_given = wikitext.read(REAL)
    data = REAL.read_bytes().replace(b"\r\n", b"\n")
    stripped = b"".join(line for line in data.splitlines(keepends=True) if line.strip())
    original = wikitext._restore_blank_lines(stripped.decode()).encode()
    assert len(original) == 1_290_590
    copies = {"lf": stripped, "crlf": stripped.replace(b"\n", b"\r\n"), "original": original,
              "original crlf": original.replace(b"\n", b"\r\n")}  # fmt: skip
    for name, copy in copies.items():
        path = tmp_path / name
        path.write_bytes(copy)
        found = wikitext.read(path)
        assert (found.pages, found.text, found.is_original) == (from_given.pages, from_given.text, True)
        assert found.note.endswith("now put back") == ("original" not in name)


@needs_file
def test_pages_of_the_hub_give_the_same_text():
    from_file = wikitext.read(REAL)
    assert wikitext.from_pages(from_file.pages, "hub") == replace(from_file, note="")


@needs_file
def test_another_text_is_reported(tmp_path):
    changed = tmp_path / "wiki.test.raw"
    changed.write_bytes(REAL.read_bytes().replace(b"Robert", b"Rupert"))
    found = wikitext.read(changed)
    assert not found.is_original
    assert "not WikiText-2's test split" in found.note


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
    with pytest.raises(InputError, match=r"expected the file wiki\.test\.raw, found none"):
        wikitext.read(tmp_path / "missing")
