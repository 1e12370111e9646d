"""Try grammars in a process of its own, whose memory and time are limited: llguidance's work on one cannot be stopped
from outside, and that on a schema of one kilobyte can take hours and all memory.

A request is {"kind": str, "text": str}, and its answer {"error": str}, null for a grammar that can be used. Its tokens
are single bytes: how long a grammar takes hardly depends on them, and so one process serves all models.
"""

import sys
from typing import Any

import llguidance

from llamita.serve.matchers import error_of, make_matcher
from llamita.system.child import answer_lines

MEMORY = 1 << 30  # bytes of address space; the process takes some 200 million before the first grammar


def main() -> None:
    """Answer requests until the input ends; `sys.argv` has the seconds of CPU time for each."""
    tokenizer = llguidance.LLTokenizer("byte")

    def answer(request: dict[str, str]) -> dict[str, Any]:
        try:
            matcher = make_matcher(llguidance, tokenizer, request["kind"], request["text"])
            matcher.compute_ff_tokens()
            matcher.compute_bitmask()
        except Exception as error:  # it raises what it likes
            return {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        return {"error": error_of(matcher)}

    answer_lines(answer, float(sys.argv[1]), MEMORY)


if __name__ == "__main__":
    main()
