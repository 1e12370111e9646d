"""llamita: a Llama checkpoint in, a 4-bit model out that runs at the limit of the hardware."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamita.engine.llm import LLM, Generation
    from llamita.errors import InputError, LlamitaError, RunError
    from llamita.loading import load

__all__ = ["LLM", "Generation", "InputError", "LlamitaError", "RunError", "__version__", "load"]
__version__ = "0.1.0"

_PLACES = {"LLM": "engine.llm", "Generation": "engine.llm", "load": "loading",
           "InputError": "errors", "LlamitaError": "errors", "RunError": "errors"}  # fmt: skip


def __getattr__(name: str) -> object:
    # Imported on first use, so that `import llamita` and `llamita --help` stay instant.
    if name in _PLACES:
        return getattr(import_module(f"llamita.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'llamita' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
