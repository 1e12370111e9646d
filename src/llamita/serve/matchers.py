"""llguidance's matchers with the limits under which all grammars are made and used."""

import re
from typing import Any

# At most one space after commas and colons, as models write it: a grammar that allows any white space can loop in it.
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LIMITS = {  # llguidance's own bounds: of time and memory in each step
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
_QUOTE = re.compile(r"<non-verbose/>|\n\s*\d+ \| ")  # what the program's lines begin with, each with its number


def make_matcher(library: Any, tokenizer: Any, kind: str, text: str) -> Any:
    """Return the matcher of a grammar. What is wrong with the grammar is in its error state.

    Args:
        library: the module llguidance.
        tokenizer: an LLTokenizer.
        kind: "schema", "regex" or "lark".
        text: the grammar.
    """
    matcher = library.LLMatcher
    if kind == "schema":
        grammar = matcher.grammar_from_json_schema(text, overrides=SPACING)
    else:
        grammar = (matcher.grammar_from_regex if kind == "regex" else matcher.grammar_from_lark)(text)
    return matcher(tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))


def error_of(matcher: Any) -> str | None:
    """Return the error that a matcher is in as one line, without the program that it quotes; None without one."""
    if not matcher.is_error():
        return None
    return " ".join(_QUOTE.split(matcher.get_error())[0].split())[:300] or "an error"
