"""Import the packages of optional extras on use, so that the lean rooms never import them."""

import logging
from importlib import import_module
from typing import Any

from llamita.errors import RunError

# When transformers imports these, they warn about kernels that nothing here uses.
_QUIET = ("torchao", "torch.utils._pytree")


def load_optional(entry: str, lacking: str) -> Any:
    """Return the function "module:function", or the module "module".

    Args:
        lacking: the message if a package is missing; {package} becomes its name.

    Raises:
        RunError: a package is missing.
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
