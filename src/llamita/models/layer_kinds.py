"""Mixed schemes: layers whose weights are stored in another way than the rest, by name.

`QuantScheme.layers` has them; here names meet a model: patterns become layers, and layers are counted for
people.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.names import linear_names, table_names
from llamita.numerics.scheme import QuantScheme

_MOST_NAMED = 3  # near matches in a message
_NEAR = 0.5  # of the letters of a pattern and of a name must agree for a near match


def with_layers(scheme: QuantScheme, layers: Mapping[str, str], name: str = "custom") -> QuantScheme:
    """The scheme with these layers stored in another way; one that nothing changes keeps its name.

    Args:
        layers: full module name to a key of `scheme.KINDS`, over the overrides that the scheme has.
    """
    mixed = replace(scheme, layers={**scheme.layers, **layers})
    return mixed if mixed == scheme else replace(mixed, name=name)


def keep_float(config: ModelConfig, scheme: QuantScheme, patterns: Iterable[str]) -> QuantScheme:
    """The scheme with every layer or table that matches a pattern left in float.

    Args:
        patterns: module names with `*`, `?` and `[...]`, where `*` takes dots too: "*.down_proj".

    Raises:
        InputError: a pattern that matches nothing.
    """
    names = [*table_names(config), *linear_names(config)]
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                "--keep-float",
                "a pattern of module names",
                f"{pattern!r}, which matches none",
                f"{_hint(config, pattern, names)}",
            )
        found |= dict.fromkeys(matched, "float")
    return with_layers(scheme, found)


def _hint(config: ModelConfig, pattern: str, names: list[str]) -> str:
    if config.tied and fnmatchcase("lm_head", pattern):
        return "the head is tied to the embedding; try model.embed_tokens"
    shapes = [f"*.{name.rpartition('.')[2]}" for name in names]
    blocks = [f"model.layers.{i}.*" for i in range(config.layers)]
    known = list(dict.fromkeys([*shapes, *blocks, *names]))
    near = get_close_matches(pattern, known, _MOST_NAMED, _NEAR)
    return f"try {' or '.join(near or known[:_MOST_NAMED])}"


def count_kinds(config: ModelConfig, scheme: QuantScheme) -> dict[str, int]:
    """How many linear layers of the blocks are stored in each way, most first."""
    counts = Counter(scheme.kind(name).name for name in linear_names(config))
    return dict(counts.most_common())


def describe_groups(scheme: Mapping[str, Any]) -> str:
    """Weights that share a scale, by the scheme's JSON values: "32", or "32 (4 layers otherwise)"."""
    others = len(scheme.get("layers", ()))
    return f"{scheme['group_size']}" + (f" ({others} layers otherwise)" if others else "")


def describe_kinds(config: ModelConfig, scheme: QuantScheme) -> str:
    """`count_kinds` in words: "w4g32 (38), w8 (3), float (1)"."""
    return ", ".join(f"{kind} ({count})" for kind, count in count_kinds(config, scheme).items())
