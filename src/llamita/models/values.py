"""Read single values of config.json, and refuse those that are impossible."""

from typing import Any

from llamita.errors import InputError, shown

EPS_RANGE = (1e-20, 1.0)  # of rms_norm_eps: more than zero in float32, below the mean square of any activation
_LARGEST_COUNT = 2**24  # far above any real vocabulary or width; keeps products of two within int64


def count(values: dict[str, Any], key: str, default: int | None = None, limit: int = _LARGEST_COUNT) -> int:
    """Return a positive integer up to `limit`; a missing value or null is the default."""
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise InputError(f"config.json: {key}", f"a positive integer up to {limit}", shown(value, 40))
    return value


def number(values: dict[str, Any], key: str, smallest: float, largest: float, default: float | None = None) -> float:
    """Return a number within these limits; a missing value or null is the default."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not smallest <= value <= largest:
        raise InputError(f"config.json: {key}", f"a number from {smallest:g} to {largest:g}", shown(value, 40))
    return float(value)


def flag(values: dict[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key}", "true or false", shown(value))
    return value
