"""The fields of every endpoint. `docs/reference/server.md` shows these tables; a test compares the two."""

from dataclasses import replace

from llamita.serve.fields import (
    ANY,
    FLAG,
    OBJECT,
    Field,
    Kind,
    Table,
    choice,
    ignored,
    is_whole,
    listing,
    number,
    record,
    refused,
    text,
    texts,
    whole,
)
from llamita.text.chat_template import EXTRAS

MOST_CHOICES = 8
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters; a stop string is looked for at every token
MOST_TOP = 20
MOST_PROMPTS = 64
_MOST_TOKENS = 1 << 31
_SEED = 1 << 63


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    return (
        all(isinstance(p, str) for p in value)
        or all(is_whole(p) for p in value)
        or all(isinstance(p, list) and p and all(is_whole(t) for t in p) for p in value)
    )


_PROMPT = Kind("a text, token ids, or a list of either", _is_prompt, {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    ]
})  # fmt: skip
_TOOL_CHOICE = Kind(
    "none, auto, required or an object",
    lambda v: v in ("none", "auto", "required") or isinstance(v, dict),
    {"oneOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object"}]},
)

_STRING = {"type": "string"}
_BIASES = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
_MESSAGES = listing(
    {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"oneOf": [_STRING, {"type": "array", "items": {"type": "object"}}]},
        },
        "required": ["role"],
    },
    least=1,
)
_FORMAT = record(("type",), type={"type": "string", "enum": ["text", "json_object", "json_schema"]})
_TOOLS = listing({"type": "object", "properties": {"type": _STRING}, "required": ["type"]})
_INPUT = replace(ANY, schema={"oneOf": [_STRING, {"type": "array", "items": {"type": "object"}}]})

_MODEL: Table = {"model": Field(text(1000), "A name of `/v1/models`; the first by default.")}
_SAMPLING: Table = {
    "temperature": Field(number(0, 2), "0 takes the likeliest token. The model's own by default."),
    "top_p": Field(number(0, 1), "Keeps the likeliest tokens up to this probability together."),
    "top_k": Field(whole(0, _MOST_TOKENS), "Keeps the k likeliest tokens; 0 keeps all."),
    "min_p": Field(number(0, 1), "Keeps tokens at least this likely relative to the likeliest."),
    "repetition_penalty": Field(number(0.01, 100), "Makes tokens of the text so far less likely; 1 changes nothing."),
    "repeat_penalty": Field(number(0.01, 100), "llama.cpp's name of `repetition_penalty`."),
    "frequency_penalty": Field(number(-2, 2), "Subtracts this for each time that the answer has the token."),
    "presence_penalty": Field(number(-2, 2), "Subtracts this if the answer has the token."),
    "logit_bias": Field(replace(OBJECT, schema=_BIASES), "Adds -100 to 100 to the logits of token ids."),
    "seed": Field(whole(-_SEED, _SEED - 1), "Makes the answer repeatable; choice i draws with seed + i."),
}
_GENERATION: Table = {
    **_MODEL,
    **_SAMPLING,
    "n": Field(whole(1, MOST_CHOICES), "How many answers to each prompt."),
    "stop": Field(texts(MOST_STOPS, LONGEST_STOP), "The answer ends before the first of these texts."),
    "min_tokens": Field(whole(0, _MOST_TOKENS), "No end before this many tokens."),
    "ignore_eos": Field(FLAG, "End tokens do not end the answer."),
    "stream": Field(FLAG, "Sends the answer in pieces."),
    "stream_options": Field(record(include_usage=FLAG.schema), "`include_usage`: a last piece with the counts."),
    "user": ignored("The key says whose request it is."),
    "metadata": ignored("Nothing is stored."),
    "store": ignored("Nothing is stored."),
    "service_tier": ignored("There is one."),
    "prompt_cache_key": ignored("Beginnings of prompts are found by their tokens."),
    "safety_identifier": ignored("Nothing is sent elsewhere."),
}
_ELSEWHERE = "send `response_format`, `guided_regex` or `guided_grammar` instead"
_PEERS: Table = {  # fields of vLLM and llama.cpp that would change the answer
    **{name: refused(_ELSEWHERE) for name in ("guided_json", "guided_choice", "structured_outputs", "grammar")},
    "json_schema": refused(_ELSEWHERE),
    "stop_token_ids": refused("send `stop`", []),
    "bad_words": refused("send `logit_bias`", []),
    "n_predict": refused("send `max_tokens`"),
    "truncate_prompt_tokens": refused("nothing is cut"),
    "length_penalty": refused("tokens are drawn one by one", 1),
    "typical_p": refused("there is no such step", 1),
    "n_probs": refused("send `logprobs`", 0),
}
_STRUCTURE: Table = {
    "response_format": Field(_FORMAT, "`text`, `json_object` or `json_schema`; the answer is sure to fit."),
    "guided_regex": Field(text(1 << 16), "The answer matches this regular expression."),
    "guided_grammar": Field(text(1 << 16), "The answer follows this grammar (Lark, as llguidance reads it)."),
}

CHAT: Table = {
    "messages": Field(_MESSAGES, "The conversation.", is_required=True),
    **_GENERATION,
    "max_completion_tokens": Field(whole(1, _MOST_TOKENS), "Most tokens of the answer; what is left by default."),
    "max_tokens": Field(whole(1, _MOST_TOKENS), "The former name of `max_completion_tokens`."),
    "logprobs": Field(FLAG, "Sends the log-probability of each token."),
    "top_logprobs": Field(whole(0, MOST_TOP), "Sends this many of the likeliest tokens at each place, too."),
    **_STRUCTURE,
    "tools": Field(_TOOLS, "Functions that the model may call."),
    "tool_choice": Field(_TOOL_CHOICE, "`none`, `auto`, `required`, or one function."),
    "parallel_tool_calls": Field(FLAG, "False: one call at most."),
    "continue_final_message": Field(FLAG, "Continues the last message of the assistant."),
    "chat_template_kwargs": Field(OBJECT, f"Values for the chat template: some of {', '.join(EXTRAS)}."),
    "reasoning_effort": ignored("Has no meaning for these models."),
    "verbosity": ignored("Has no meaning for these models."),
    "prediction": ignored("Drafts are taken from the text so far, and from the server's `--draft-from`."),
    "cache_prompt": ignored("Beginnings of prompts are always kept."),
    "functions": refused("send `tools` instead"),
    "function_call": refused("send `tool_choice` instead", "none", "auto"),
    "modalities": refused("answers are text", ["text"]),
    "audio": refused("answers are text"),
    "web_search_options": refused("nothing is looked up elsewhere"),
    "add_generation_prompt": refused("a conversation is open for its answer", True),
    "chat_template": refused("templates of requests are not run"),
    "best_of": refused("send `n`", 1),
    "use_beam_search": refused("tokens are drawn one by one", False),
    **_PEERS,
}

COMPLETIONS: Table = {
    "prompt": Field(_PROMPT, "A text, token ids, or a list of either.", is_required=True),
    **_GENERATION,
    "max_tokens": Field(whole(0, _MOST_TOKENS), "Most tokens of the answer, 16 by default; 0 with `echo`."),
    "logprobs": Field(whole(0, MOST_TOP), "Sends the log-probabilities of each token and of this many likeliest."),
    "echo": Field(FLAG, "Sends the prompt before the answer, with its log-probabilities."),
    **_STRUCTURE,
    "add_special_tokens": Field(FLAG, "False: no BOS token before a text."),
    "suffix": refused("the model has no tokens for it", ""),
    "best_of": refused("send `n`", 1),
    "use_beam_search": refused("tokens are drawn one by one", False),
    **_PEERS,
}

RESPONSES: Table = {
    "input": Field(_INPUT, "A text, or a list of messages, calls and their outputs.", is_required=True),
    "instructions": Field(text(), "The system message."),
    **_MODEL,
    "temperature": _SAMPLING["temperature"],
    "top_p": _SAMPLING["top_p"],
    "max_output_tokens": Field(whole(1, _MOST_TOKENS), "Most tokens of the answer; what is left by default."),
    "stream": _GENERATION["stream"],
    "text": Field(record(format=_FORMAT.schema), "`format`: `text`, `json_object` or `json_schema`."),
    "tools": Field(_TOOLS, "Functions; tools of other kinds are left out."),
    "tool_choice": CHAT["tool_choice"],
    "parallel_tool_calls": CHAT["parallel_tool_calls"],
    "metadata": Field(OBJECT, "Sent back."),
    "top_logprobs": CHAT["top_logprobs"],
    "include": ignored("Log-probabilities come with `top_logprobs`."),
    "store": ignored("Nothing is stored."),
    "reasoning": ignored("Has no meaning for these models."),
    "truncation": refused("nothing is cut", "disabled"),
    "user": ignored("The key says whose request it is."),
    "service_tier": ignored("There is one."),
    "prompt_cache_key": ignored("Beginnings of prompts are found by their tokens."),
    "safety_identifier": ignored("Nothing is sent elsewhere."),
    "previous_response_id": refused("nothing is stored; send the whole conversation"),
    "conversation": refused("nothing is stored; send the whole conversation"),
    "background": refused("an answer lasts as long as its connection", False),
    "prompt": refused("there are no stored prompts"),
}

EMBEDDINGS: Table = {
    "input": Field(_PROMPT, "A text, token ids, or a list of either.", is_required=True),
    **_MODEL,
    "encoding_format": Field(choice("float", "base64"), "Lists of numbers, or little-endian float32 in base64."),
    "dimensions": refused("the vectors have the model's width"),
    "user": ignored("The key says whose request it is."),
}

TOKENIZE: Table = {
    **_MODEL,
    "prompt": Field(text(), "The text; or send `messages`, or `content`."),
    "content": Field(text(), "The text, as llama.cpp's clients send it: without a BOS token."),
    "messages": Field(_MESSAGES, "A conversation."),
    "tools": CHAT["tools"],
    "add_special_tokens": Field(FLAG, "False: no BOS token."),
    "add_special": Field(FLAG, "The same for `content`; false by default."),
    "return_token_strs": Field(FLAG, "Sends the text of each token, too."),
}
DETOKENIZE: Table = {
    **_MODEL,
    "tokens": Field(listing({"type": "integer", "minimum": 0}), "Token ids.", is_required=True),
}
ADAPTER: Table = {**_MODEL, "name": Field(text(200), "The adapter's directory below `--adapters`.", is_required=True)}
