"""The tables of fields, and what is made from them: docs, messages, the OpenAPI document."""

import json
import sys

import pytest
from places import ROOT
from served import serving

import llamita
from llamita.serve import fields, tables
from llamita.serve.errors import ApiError
from llamita.serve.openapi import openapi

sys.path.insert(0, str(ROOT / "tools"))
import server_tables

TABLES = [  # of endpoints: those without an underscore
    value for name, value in vars(tables).items() if isinstance(value, dict) and name[0].isalpha() and name != "EXTRAS"
]


def test_the_docs_have_the_tables() -> None:
    page = server_tables.PAGE.read_text("utf-8")
    between = page.partition(server_tables.BEGIN)[2].partition(server_tables.END)[0]
    assert between.strip() == server_tables.render().strip(), "run tools/server_tables.py"
    assert set(map(id, TABLES)) == set(map(id, server_tables.SECTIONS.values()))


def test_every_row_says_what_it_does() -> None:
    for table in TABLES:
        for name, row in table.items():
            assert row.note, name
            assert row.effect in ("used", "no effect", "refused")
            assert not (row.kind and row.refusal)


def test_reading_names_the_field() -> None:
    table = {
        "a": fields.Field(fields.number(0, 1), "x", is_required=True),
        "b": fields.refused("of this", False),
        "c": fields.ignored("x"),
        "d": fields.Field(fields.whole(0, 3), "x"),
    }
    assert fields.read({"a": 1, "b": False, "c": object(), "d": 2.0, "e": 1}, table) == {"a": 1, "d": 2}
    for body, param in (
        ({}, "a"),
        ({"a": None}, "a"),
        ({"a": 2}, "a"),
        ({"a": 1, "b": True}, "b"),
        ({"a": 1, "d": 2.5}, "d"),
    ):
        with pytest.raises(ApiError) as error:
            fields.read(body, table)
        assert error.value.param == param
    with pytest.raises(ApiError) as error:
        fields.read({"a": "x" * 10_000}, table, "outer")
    assert error.value.param == "outer.a"
    assert len(error.value.message) < 200


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), [], {}])
def test_numbers_are_numbers(value: object) -> None:
    assert not fields.number(0, 10).accepts(value)
    assert not fields.whole(0, 10).accepts(value)


def test_the_openapi_document_has_every_path() -> None:
    with serving({"embedded": llamita.load("embedded")}) as served:
        status, _, data = served.ask("GET", "/openapi.json")
        assert status == 200
        document = json.loads(data)
        assert document == openapi()
        for path, methods in document["paths"].items():
            for method in methods:
                status = served.ask(
                    method.upper(), path.replace("{name}", "embedded"), {} if method == "post" else None
                )[0]
                assert status not in (404, 405, 500) or (path, method) == ("/v1/adapters/{name}", "delete")
