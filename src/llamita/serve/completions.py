"""`/v1/completions`: continuations of texts or token ids, with the prompt's log-probabilities if they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from llamita.engine.requests import Options, Request
from llamita.serve.bodies import ALL_BYTES
from llamita.serve.encoding import prompt_ids
from llamita.serve.engine_thread import Update
from llamita.serve.errors import too_long, wrong
from llamita.serve.exchange import Exchange
from llamita.serve.fields import read
from llamita.serve.logprobs import CompletionLogprobs
from llamita.serve.options import engine_options, for_choice
from llamita.serve.reply import Part, reason_of, reply
from llamita.serve.state import Job, ServerState
from llamita.serve.tables import COMPLETIONS, MOST_PROMPTS

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_SCORE_BYTES = 128  # of one log-probability with its token


@dataclass
class CompletionJob(Job):
    """A job that continues texts.

    Attributes:
        echo: the prompt is sent before the answer.
        has_logprobs: log-probabilities are sent.
    """

    echo: bool = False
    has_logprobs: bool = False

    @property
    def score_bytes(self) -> int:
        """The memory that the prompts' log-probabilities take."""
        asked = [(r.prompt_logprobs, len(r.ids)) for r in self.requests if r.prompt_logprobs is not None]
        return sum(_SCORE_BYTES * (top + 1) * tokens for top, tokens in asked)


async def completions(state: ServerState, exchange: Exchange) -> None:
    """Continue texts, whole or as a stream."""
    values = read(await exchange.read_json(state.bodies), COMPLETIONS)
    state.check_room(exchange, values.get("model"))
    job = await state.prepared(exchange, values, partial(_prepare, owner=exchange.owner))
    exchange.hold(state.bodies, job.score_bytes)
    writers = [_CompletionWriter(job, request) for request in job.requests]
    await reply(state, exchange, job, writers, values, ("cmpl", "text_completion", "text_completion"))


def prompts_of(value: Any, param: str = "prompt") -> list[Any]:
    """Return the prompts of a body's field: texts, or lists of token ids.

    Raises:
        ApiError: there are too many.
    """
    is_several = isinstance(value, list) and isinstance(value[0], str | list)
    prompts: list[Any] = value if is_several else [value]
    if len(prompts) > MOST_PROMPTS:
        raise wrong(param, f"expected at most {MOST_PROMPTS}, got {len(prompts)}.")
    return prompts


def _prepare(state: ServerState, values: Mapping[str, Any], owner: str | None) -> CompletionJob:
    """Return the job of a checked body."""
    served = state.models.find(values.get("model"))
    llm, echo, logprobs = served.llm, values.get("echo", False), values.get("logprobs")
    most = values.get("max_tokens", DEFAULT_MAX_TOKENS)
    if most == 0 and not echo:
        raise wrong("max_tokens", "0 needs `echo: true`.")
    options: Options = {
        **engine_options(values, llm.config.vocab_size),
        "max_tokens": most,
        "logprobs": logprobs,
        "prompt_logprobs": (logprobs or 0) if echo and (logprobs is not None or most == 0) else None,
        "owner": owner,
        "adapter": served.adapter,
        "constraint": served.structure.constraint(values, owner),
    }
    n, requests = values.get("n", 1), []
    for prompt in prompts_of(values["prompt"]):
        ids = prompt_ids(served, prompt, values.get("add_special_tokens", True))
        if not ids or len(ids) + min(most, 1) > llm.context:
            raise too_long(len(ids), llm.context, "prompt")
        requests += [llm.check(ids, **for_choice(options, choice)) for choice in range(n)]
    job = CompletionJob(served, requests, n, echo, logprobs is not None)
    if job.score_bytes > ALL_BYTES // 2:
        raise wrong("logprobs", f"{job.score_bytes} bytes for those of the prompts, the most is {ALL_BYTES // 2}.")
    return job


class _CompletionWriter:
    """Turns the updates of one choice into entries with `text` and `logprobs`."""

    def __init__(self, job: CompletionJob, request: Request) -> None:
        self._job, self._request = job, request
        self._tokenizer = job.served.llm.tokenizer
        self._is_first = True
        self._logprobs = CompletionLogprobs(self._tokenizer, request.continues)

    def opening(self) -> list[Part]:
        """Return nothing: a completion begins with its text."""
        return []

    def parts(self, update: Update) -> Iterator[Part]:
        """Yield the text of an update with the log-probabilities of its tokens."""
        yield self.whole(update)

    def whole(self, update: Update) -> Part:
        """Return the text of an update with the log-probabilities of its tokens."""
        text, parts, has_logprobs = update.text, [], self._job.has_logprobs
        if self._is_first and self._job.echo:
            ids = self._request.ids.tolist()
            text = self._tokenizer.decode(ids) + text
            if has_logprobs:
                parts.append(self._logprobs.add_prompt(update.prompt_logprobs, ids))
        self._is_first = False
        if has_logprobs:
            parts.append(self._logprobs.add(update.logprobs))
        logprobs = {name: [entry for part in parts for entry in part[name]] for name in parts[0]} if parts else None
        return {
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason_of(update.generation) if update.generation else None,
        }
