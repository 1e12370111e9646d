"""Write the tables of `docs/reference/server.md` from the tables that the server checks requests by.

python tools/server_tables.py [--check]
"""

import sys
from pathlib import Path

from llamita.serve import tables
from llamita.serve.fields import Table

PAGE = Path(__file__).parents[1] / "docs/reference/server.md"
SECTIONS: dict[str, Table] = {
    "/v1/chat/completions": tables.CHAT,
    "/v1/completions": tables.COMPLETIONS,
    "/v1/responses": tables.RESPONSES,
    "/v1/embeddings": tables.EMBEDDINGS,
    "/tokenize": tables.TOKENIZE,
    "/detokenize": tables.DETOKENIZE,
    "/v1/adapters": tables.ADAPTER,
}
BEGIN, END = "<!-- written by tools/server_tables.py -->", "<!-- end -->"


def main() -> None:
    """Write the page, or check it."""
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before}{BEGIN}\n{render()}{END}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if made == page else f"{PAGE.name}: is out of date; run tools/server_tables.py")
    PAGE.write_text(made, "utf-8")


def render() -> str:
    """Return all tables in Markdown."""
    parts = []
    for path, table in SECTIONS.items():
        parts.append(f"\n### `POST {path}`\n| field | | what it does |\n|---|---|---|\n")
        for name, row in table.items():
            what = f"{row.note} Needed." if row.is_required else row.note
            if row.refusal:
                what = f"{what[0].upper()}{what[1:]}."
                if row.neutral:
                    what += f" Accepted: {', '.join(f'`{_json(value)}`' for value in row.neutral)}."
            holds = row.kind.expected if row.kind else row.effect
            parts.append(f"| `{name}` | {holds} | {what} |\n")
    return "".join(parts)


def _json(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value).replace("'", '"')


if __name__ == "__main__":
    main()
