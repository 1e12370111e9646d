"""Tools in plain text, for models whose chat template knows none: they are described in the system message.

The form is that of Llama 3.1 and 3.2, so the parser of calls and the grammars of required calls serve them, too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamita.serve.tools import CallForm
from llamita.text.messages import Message, plain_messages

_ASK = (
    "You may call these functions. To call one, answer with nothing but its call, as JSON in this form:\n"
    "{form}\nFunctions:\n"
)
_RESULT = "The function's result: "


def in_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: CallForm) -> list[Message]:
    """Return a conversation in which tools, calls and results are texts of the system, assistant and user.

    Raises:
        InputError: a message is not OpenAI's.
    """
    told = [_in_text(message, form) for message in plain_messages(messages)]
    if not tools:
        return told
    example = f"{form.begin('NAME')}{{…}}{form.end}"
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    system = _ASK.format(form=example) + listed
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{system}"}, *told[1:]]
    return [{"role": "system", "content": system}, *told]


def _in_text(message: Message, form: CallForm) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": _RESULT + message["content"]}
    calls = message.get("tool_calls", [])
    written = [
        form.begin(call["function"]["name"]) + json.dumps(call["function"]["arguments"], ensure_ascii=False) + form.end
        for call in calls
    ]
    if not written:
        return message
    parts = [message["content"]] if message["content"] else []
    between = form.between or "; "
    return {"role": message["role"], "content": "\n".join([*parts, between.join(written)])}
