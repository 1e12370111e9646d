"""Grammars that answers keep to, by llguidance: JSON, JSON schemas, regular expressions, Lark grammars, calls of tools.

llguidance never raises: after an error it stays in an error state. So that state is looked at after every call, and
then the generation ends. An answer is never continued without its grammar.
"""

import hashlib
import json
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from llamita.errors import InputError, RunError, first_line, shown
from llamita.serve.matchers import SPACING, error_of, make_matcher
from llamita.serve.schemas import LARGEST_SCHEMA, call_schema, prepare_schema
from llamita.serve.tools import LLAMA, CallForm
from llamita.system.extras import load_optional
from llamita.system.helpers import Ended, Helpers

COMPILE_SECONDS = 1.0  # of CPU time for a grammar and its first mask
FIRST_SECONDS = 0.15  # of that for the first mask; what takes longer would take long at other tokens, too
STEP_SECONDS = 0.5  # of CPU time for what may follow a token; usual grammars take microseconds
MEAN_SECONDS = 0.02  # the same for each token of an answer, beyond the first `STEP_SECONDS` of all: others wait for it
KEPT_GRAMMARS, ALL_GRAMMARS = 32, 512  # of one owner, and of all
_TRIAL = str(Path(__file__).with_name("grammar_process.py"))
MOST_CALLS = 16  # in one answer
_LACKING = "structured output needs {package}; try pip install 'llamita[serve]' (in a checkout '.[serve]')"


class Grammars:
    """Makes the grammars of one model. Threads may share it.

    Args:
        tokenizer: the text of its tokenizer.json.
        vocab_size: the number of its logits.
        ends: its end tokens, at least one.

    Raises:
        InputError: llguidance cannot read the tokenizer.
        RunError: llguidance is not installed.
    """

    def __init__(self, tokenizer: str, vocab_size: int, ends: Sequence[int]) -> None:
        self._library = load_optional("llguidance", _LACKING)
        if not ends:
            raise InputError("grammar", "a model with an end token", "none")
        try:
            self._tokenizer = self._library.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends))
        except Exception as error:  # it raises what it likes
            raise InputError("tokenizer.json", "a tokenizer that llguidance reads", first_line(error)) from None
        self._vocab_size, self._ends = vocab_size, tuple(ends)
        self._kept: dict[str | None, OrderedDict[bytes, GrammarConstraint | InputError]] = {}  # by owner
        self._lock = Lock()
        self._trials = Helpers(_TRIAL, [str(COMPILE_SECONDS)])
        self._workers = ThreadPoolExecutor(1, "mask")

    def json_schema(
        self, schema: object, where: str = "response_format", owner: str | None = None
    ) -> "GrammarConstraint":
        """Return the grammar of the JSON texts that are valid by a schema; errors name `where`.

        One that was made before is kept for its owner alone: another could tell by the time that somebody uses it.

        Raises:
            InputError: it is too large or takes too long, or llguidance cannot keep to all of it.
        """
        prepared = json.dumps(prepare_schema(schema, where))
        return self._compile(where, "schema", prepared, owner)

    def regex(self, pattern: object, where: str = "regex", owner: str | None = None) -> "GrammarConstraint":
        """Return the grammar of the texts that match a regular expression (Rust's, without look-around) as a whole."""
        text = _checked_text(pattern, where)
        if (len(text) - len(text.rstrip("\\"))) % 2:  # llguidance would leave it out
            raise InputError(where, "a character after each backslash", "the end of the pattern")
        return self._compile(where, "regex", text, owner)

    def lark(self, grammar: object, where: str = "grammar", owner: str | None = None) -> "GrammarConstraint":
        """Return a grammar that is written in llguidance's dialect of Lark."""
        return self._compile(where, "lark", _checked_text(grammar, where), owner)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        form: CallForm,
        *,
        name: str | None = None,
        parallel: bool = True,
        otherwise: object = None,
        owner: str | None = None,
    ) -> "GrammarConstraint":
        """Return the grammar of one or more calls of tools that are checked already, in the form of a model.

        Args:
            name: the only tool that may be called.
            parallel: whether several calls may follow one another.
            otherwise: the schema of an answer without calls, if that is allowed, too.
        """
        names, rules = [], []
        for place, tool in enumerate(tools):
            function = tool["function"]
            if name in (None, function["name"]):
                names.append(f"call_{place}")
                where = f"tools[{place}].function.parameters"
                parameters = prepare_schema(function.get("parameters") or _NO_PARAMETERS, where)
                if otherwise is not None and form is LLAMA:
                    rules.append(f"call_{place}: %json {_as_json(call_schema(function['name'], parameters))}")
                    continue
                if isinstance(parameters, dict):
                    parameters = {"type": "object", **parameters}
                begin, end = json.dumps(form.begin(function["name"])), json.dumps(form.end)
                rules.append(f"call_{place}: {begin} arguments_{place} {end}")
                rules.append(f"arguments_{place}: %json {_as_json(parameters)}")
        start = "call"
        if parallel and form.between:
            start += f" ({json.dumps(form.between)} call){{0,{MOST_CALLS - 1}}}"
        if otherwise is not None:
            start += " | answer"
            rules.append(f"answer: %json {_as_json(prepare_schema(otherwise, 'response_format'))}")
        lines = [f"start: {start}", f"call: {' | '.join(names)}", *rules]
        return self._compile("tools", "lark", "\n".join(lines), owner)

    def _compile(self, where: str, kind: str, text: str, owner: str | None) -> "GrammarConstraint":
        """Return an unused copy of a grammar, which is made, or kept from another time, as are refusals."""
        key = hashlib.sha256(f"{kind}:{text}".encode()).digest()
        with self._lock:
            found = self._kept.get(owner, {}).get(key)
        if found is None:
            try:
                found = self._make(kind, text)
            except InputError as error:
                found = error.with_traceback(None)  # which would keep what the frames hold
        self._keep(owner, key, found)
        if isinstance(found, InputError):
            raise found.at(where)
        return found.copy()

    def _keep(self, owner: str | None, key: bytes, found: "GrammarConstraint | InputError") -> None:
        """Keep a grammar as its owner's newest. Where there are too many in all, who has most loses the oldest."""
        with self._lock:
            own = self._kept.setdefault(owner, OrderedDict())
            own[key] = found
            own.move_to_end(key)
            while len(own) > KEPT_GRAMMARS:
                own.popitem(last=False)
            while sum(map(len, self._kept.values())) > ALL_GRAMMARS:
                max(self._kept.values(), key=len).popitem(last=False)

    def _make(self, kind: str, text: str) -> "GrammarConstraint":
        """Return a grammar after a trial of it in another process."""
        self._try(kind, text)
        try:
            made = make_matcher(self._library, self._tokenizer, kind, text)
        except Exception as error:  # misuse of the interface; what a caller may write wrongly is in the error state
            raise _refused(first_line(error)) from None
        if error := error_of(made):
            raise _refused(error)
        constraint = GrammarConstraint(made, self._vocab_size, self._ends, self._workers)
        constraint.allowed()
        if constraint.spent > FIRST_SECONDS:
            raise _refused(f"one that takes {constraint.spent:.1f} s for its first token")
        return constraint

    def _try(self, kind: str, text: str) -> None:
        """Raise InputError for a grammar that takes too long or too much memory, or is none."""
        try:
            answer = json.loads(self._trials.ask(json.dumps({"kind": kind, "text": text})))
        except Ended as ended:
            if ended.code == -signal.SIGPROF:
                raise InputError("", f"a grammar that is made within {COMPILE_SECONDS:g} s", "a slower one") from None
            if ended.code < 0:
                raise _refused("one that takes too much memory") from None
            raise RunError("grammar", "a process that tries it", f"exit code {ended.code}", ended.last) from None
        if answer["error"]:
            raise _refused(answer["error"])


def _as_json(schema: dict[str, Any] | bool) -> str:
    """Return a prepared schema as a part of a grammar."""
    return json.dumps({**schema, "x-guidance": SPACING} if isinstance(schema, dict) else schema)


def _refused(why: str) -> InputError:
    return InputError("", "a grammar that llguidance takes", why)


class GrammarConstraint:
    """A grammar and its state. `accept` has a worker find what may come next while the model computes its next step.

    Forced tokens are those of the canonical tokenization of the text that must come. Where there are some, `allowed`
    allows the first of them alone, so that a draft of them is right by construction.

    Attributes:
        spent: seconds of CPU time for all masks so far.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: tuple[int, ...], workers: ThreadPoolExecutor) -> None:
        self._matcher, self._vocab_size, self._ends, self._workers = matcher, vocab_size, ends, workers
        self._lock = Lock()  # the matcher is used by one thread at a time
        self._count = 0  # accepted tokens
        self.spent = 0.0
        self._forced: list[int] | None = None  # None: not known yet
        self._mask: np.ndarray | None = None
        self._failure: str | None = None
        self._is_ended = False

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next: bool (vocab,)."""
        with self._lock:
            self._find_forced()
            self._find_mask()
            self._check()
            assert self._mask is not None
            return self._mask

    def accept(self, token: int) -> None:
        """Add a token that `allowed` has."""
        with self._lock:
            self._check()
            is_end = token in self._ends
            if self._is_ended or (is_end and not self._matcher.is_accepting()):
                self._failure = "a token after or before its end"
            elif is_end:
                self._is_ended = True
            elif not self._matcher.consume_token(token):
                self._failure = error_of(self._matcher) or "a token that it does not allow"
            self._check()
            rest = self._forced[1:] if self._forced and self._forced[0] == token else None
            self._forced, self._mask = rest or None, None
            self._count += 1
            count = self._count
        if not self._is_ended:
            self._workers.submit(self._prepare, count)

    def forced(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that must come next; [] where there is a choice."""
        if self._forced is None and self._failure is None:
            with self._lock:
                self._find_forced()
        return [] if self._failure is not None else (self._forced or [])[:limit]

    def copy(self) -> Self:
        """Return an independent one in the same state."""
        with self._lock:
            other = type(self)(self._matcher.deep_copy(), self._vocab_size, self._ends, self._workers)
            other._forced, other._mask = self._forced, self._mask
            other._failure, other._is_ended = self._failure, self._is_ended
            other._count, other.spent = self._count, self.spent
        return other

    def _prepare(self, count: int) -> None:
        """Find what may follow so many tokens, in a worker. `forced` waits for the first part alone."""
        for find in (self._find_forced, self._find_mask):
            with self._lock:
                if self._count == count:
                    find()

    def _find_forced(self) -> None:
        if self._forced is None:
            is_over = self._is_ended or self._matcher.is_stopped()
            self._forced = [] if is_over else self._timed(self._matcher.compute_ff_tokens)

    def _find_mask(self) -> None:
        if self._mask is not None:
            return
        mask = np.zeros(self._vocab_size, dtype=bool)
        if self._forced:
            mask[self._forced[0]] = True
        else:
            if not (self._is_ended or self._matcher.is_stopped()):
                bits = np.frombuffer(self._timed(self._matcher.compute_bitmask), dtype=np.uint8)
                mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
            mask[list(self._ends)] = self._is_ended or self._matcher.is_accepting()
        self._mask = mask

    def _timed(self, find: Callable[[], Any]) -> Any:
        """Return what may follow; a grammar that takes long for it fails."""
        began = time.thread_time()
        found = find()
        seconds = time.thread_time() - began
        self.spent += seconds
        if seconds > STEP_SECONDS or self.spent > STEP_SECONDS + MEAN_SECONDS * self._count:
            self._failure = f"more than {STEP_SECONDS:g} s for a token, or {MEAN_SECONDS:g} s for each"
        return found

    def _check(self) -> None:
        if self._failure is None:
            self._failure = error_of(self._matcher)
        if self._failure is not None:
            raise InputError("grammar", "an answer that keeps to it", self._failure)


_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def _checked_text(text: object, where: str) -> str:
    try:
        size = len(text.encode()) if isinstance(text, str) else 0
    except UnicodeEncodeError:
        size = 0
    if not isinstance(text, str) or not 0 < size <= LARGEST_SCHEMA:
        raise InputError(where, f"a text of 1 to {LARGEST_SCHEMA} bytes of UTF-8", shown(text))
    return text
