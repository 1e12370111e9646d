"""The one error of the server: an answer in OpenAI's form. Clients read its status, `code` and `param`."""

from typing import Any

from llamita.errors import LlamitaError

_LONGEST = 1000  # characters of a message; with the rest, a body stays under 2 KB


class ApiError(Exception):
    """A request that is refused, or cannot be finished.

    Args:
        status: the HTTP status.
        message: one sentence or two for whoever wrote the client.
        kind: OpenAI's `type`.
        param: the field at fault.
        code: a word that programs compare.
        headers: more headers of the answer.
        more: more entries of the error object, such as counts.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message[:_LONGEST]
        self.kind, self.param, self.code = kind, param, code
        self.headers, self.more = headers or {}, more or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the refusal of a field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code or "invalid_value")


def from_llamita(error: LlamitaError, param: str | None = None) -> ApiError:
    """Return the refusal for an error of the library that the request caused."""
    return ApiError(400, str(error), param=param or error.where.split(":")[0], code="invalid_value")


def too_long(prompt: int, context: int, param: str, at_least: bool = False) -> ApiError:
    """Return the refusal of a prompt that leaves no room for an answer.

    LiteLLM looks for OpenAI's phrase in the text. LangChain looks for the code there: openai 3 shows the text alone.

    Args:
        prompt: its tokens.
        context: the most that there may be.
        param: the field.
        at_least: it has more, but they were not counted.
    """
    tokens = f"at least {prompt}" if at_least else f"{prompt}"
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in {tokens} tokens. "
        f"Please reduce the length of the {param}; nothing is cut here (context_length_exceeded).",
        param=param,
        code="context_length_exceeded",
        more={"n_prompt_tokens": prompt, "n_ctx": context},
    )


def no_model(name: str, known: list[str]) -> ApiError:
    """Return the refusal of a model's name."""
    message = f"The model {name[:80]!r} does not exist here. This server has: {', '.join(known)}."
    return ApiError(404, message, param="model", code="model_not_found")


def busy(message: str, seconds: int, code: str) -> ApiError:
    """Return the refusal of a request for which there is no room now; `seconds` is an honest time to wait."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=headers)


def unavailable(message: str, code: str, seconds: int = 5) -> ApiError:
    """Return the answer of a server that starts or stops."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(503, message, kind="unavailable_error", code=code, headers=headers)


def timed_out(message: str) -> ApiError:
    """Return the answer to a request that took too long. The client's library is told not to send it again."""
    headers = {"x-should-retry": "false"}
    return ApiError(503, message, kind="timeout_error", code="timeout", headers=headers)


def internal(request_id: str) -> ApiError:
    """Return the answer to a fault of the server. The log has its text, because that can hold memory addresses."""
    return ApiError(
        500, f"The server failed; its log has more under {request_id}.", kind="server_error", code="internal"
    )
