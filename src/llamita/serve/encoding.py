"""From prompts to token ids. A text that is much too long is refused before it costs seconds and gigabytes."""

from typing import Any

from llamita.serve.errors import too_long, wrong
from llamita.serve.served import Served

_PIECE = 64 << 10  # characters: some 20 ms, and 20 MB while they last
_CUT = 16  # tokens that a cut between two pieces may add to the count; 128 spaces cut in two are up to 14


def encode_text(served: Served, text: str, add_bos: bool | None, param: str, most: int | None = None) -> list[int]:
    """Return the token ids of a text.

    Args:
        served: the model.
        text: special tokens that are written out in it count as such.
        add_bos: see `Tokenizer.encode`.
        param: the field that it came from, for the error.
        most: tokens, by default those of the context; a text that is just over it is not refused here.

    Raises:
        ApiError: it surely has more.
        InputError: it is not UTF-8.
    """
    tokenizer, most = served.llm.tokenizer, served.llm.context if most is None else most
    count = 0
    if len(text) > 4 * _PIECE:
        for start in range(0, len(text), _PIECE):
            count += len(tokenizer.encode(text[start : start + _PIECE], add_bos=False)) - _CUT
            if count > most:
                raise too_long(count, served.llm.context, param, at_least=True)
    return tokenizer.encode(text, add_bos=add_bos)


def prompt_ids(served: Served, prompt: Any, add_special: bool, param: str = "prompt") -> list[int]:
    """Return the token ids of one prompt, which need not fit the context.

    Raises:
        ApiError: an id is outside the vocabulary, or there is far too much text.
        InputError: it is not UTF-8.
    """
    tokenizer, size = served.llm.tokenizer, served.llm.config.vocab_size
    if isinstance(prompt, str):
        ids = encode_text(served, prompt, None if add_special else False, param)
        return ids or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    ids = [int(token) for token in prompt]
    if not all(0 <= token < size for token in ids):
        raise wrong(param, f"expected token ids from 0 to {size - 1}.")
    return ids
