"""What only an extra of the installation brings, imported on use, so that nothing lean ever imports it."""

import logging
from importlib import import_module
from typing import Any

from llamita.errors import RunError

# What these say when transformers imports them is about kernels that nothing here uses.
_QUIET = ("torchao", "torch.utils._pytree")


def load_optional(entry: str, lacking: str) -> Any:
    """The function "module:function", or the module "module".

    Args:
        lacking: what to say where a package is missing, whose name stands for {package}.

    Raises:
        RunError: that.
    """
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    module, _, function = entry.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "llamita":
            raise
        raise RunError(lacking.format(package=error.name)) from None
    return getattr(found, function) if function else found
