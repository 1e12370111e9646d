"""llamita: a Llama checkpoint in, a 4-bit model out that runs at the limit of the hardware."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamita.engine.llm import LLM, Generation, load

__all__ = ["LLM", "Generation", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import llamita` and `llamita --help` stay instant.
    if name in ("LLM", "Generation", "load"):
        return getattr(import_module("llamita.engine.llm"), name)
    raise AttributeError(f"module 'llamita' has no attribute {name!r}")
