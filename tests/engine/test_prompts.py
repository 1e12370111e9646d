"""What a caller may get wrong about a prompt, and what the package shows of itself."""

from typing import Any

import pytest

import llamita
from llamita.engine.llm import LLM
from llamita.errors import InputError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", preset="none")  # the same as without a scheme, by its former name


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [1, None], {"role": "user", "content": "x"}])
def test_what_is_no_prompt_is_named(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt: expected a text, messages or token ids, got ") as error:
        llm.generate(prompt)
    assert ("generate_many" in str(error.value)) == (prompt == ["a", "b"])


def test_one_text_is_not_many(llm: LLM) -> None:
    assert llm.scheme is None
    with pytest.raises(InputError, match=r"prompts: expected several texts, got one; try \[text\]"):
        llm.generate_many("text")
    with pytest.raises(InputError, match="prompts: expected several texts, got None"):
        llm.generate_many(None)  # type: ignore[arg-type]


def test_the_package_lists_its_public_names() -> None:
    assert dir(llamita) == sorted(llamita.__all__)
    assert {"load", "LLM", "InputError", "RunError"} <= set(dir(llamita))
    assert all(getattr(llamita, name) for name in dir(llamita))
