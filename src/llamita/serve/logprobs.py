"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from llamita.engine.logprobs import TokenLogprob
from llamita.text.tokenizer import Detokenizer, Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity; vLLM sends this


def chat_entry(score: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return an entry of `logprobs.content`: of a chat's token and its alternatives."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token, skip_special=False)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LOWEST), "bytes": list(data)}

    return {**one(score.token, score.logprob), "top_logprobs": [one(token, value) for token, value in score.top]}


class CompletionLogprobs:
    """Builds the `logprobs` object of a completion, piece by piece.

    Args:
        tokenizer: of the model.
        continues: the answer continues the prompt's text.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._tokenizer, self._offset = tokenizer, 0
        self._prompt = Detokenizer(tokenizer)
        self._answer = Detokenizer(tokenizer, continues=continues)

    def add_prompt(self, scores: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> dict[str, Any]:
        """Return the object for the prompt; nothing predicts its first token, whose score is None."""
        return self._entries(scores, tokens, self._prompt)

    def add(self, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the object for the next tokens of the answer."""
        return self._entries(scores, [score.token for score in scores], self._answer)

    def _entries(
        self, scores: Sequence[TokenLogprob | None], tokens: Sequence[int], detokenizer: Detokenizer
    ) -> dict[str, Any]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score, token in zip(scores, tokens, strict=True):
            result["tokens"].append(self._text_of(token))
            result["token_logprobs"].append(None if score is None else max(score.logprob, _LOWEST))
            result["top_logprobs"].append(None if score is None else self._top(score))
            result["text_offset"].append(self._offset)
            self._offset += len(detokenizer.add(token))  # special tokens are not in the text, nor halves of characters
        return result

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token_bytes(token, skip_special=False).decode(errors="replace")

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        """Return the likeliest by their text, and the token itself. Of two with one text the likelier counts."""
        top: dict[str, float] = {}
        for token, logprob in score.top:
            top.setdefault(self._text_of(token), max(logprob, _LOWEST))
        own = self._text_of(score.token)
        top[own] = max(top.get(own, _LOWEST), score.logprob, _LOWEST)
        return top
