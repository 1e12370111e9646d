"""What only an extra of the installation brings, imported on use, so that nothing lean ever imports it."""

from importlib import import_module
from typing import Any

from llamita.errors import RunError


def load_optional(entry: str, lacking: str) -> Any:
    """The function "module:function", or the module "module".

    Args:
        lacking: what to say where a package is missing, whose name stands for {package}.

    Raises:
        RunError: that.
    """
    module, _, function = entry.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "llamita":
            raise
        raise RunError(lacking.format(package=error.name)) from None
    return getattr(found, function) if function else found
