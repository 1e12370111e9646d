"""Mix schemes: store the weights of some layers in another way than the rest, by name.

`QuantScheme.layers` lists them. This module matches patterns with a model's layers, gives layers group sizes that fit,
and counts layers for people.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from llamita.errors import InputError, shown
from llamita.models.config import ModelConfig
from llamita.models.names import EMBEDDING, HEAD, linear_names, table_names
from llamita.numerics.scheme import GROUP_SIZES, KINDS, QuantScheme, fitting_group_size

_MOST_NAMED = 3  # near matches in a message
_NEAR = 0.5  # share of letters of a pattern and a name that must agree for a near match


def with_layers(scheme: QuantScheme, layers: Mapping[str, str], name: str = "custom") -> QuantScheme:
    """Return the scheme with these layers stored in another way; keep its name if nothing changes.

    Args:
        layers: full module name to a key of `scheme.KINDS`; they replace the scheme's overrides of the same layers.
    """
    mixed = replace(scheme, layers={**scheme.layers, **layers})
    return mixed if mixed == scheme else replace(mixed, name=name)


def keep_float(config: ModelConfig, scheme: QuantScheme, patterns: Iterable[str]) -> QuantScheme:
    """Return the scheme with every layer or table that matches a pattern left in float.

    Args:
        patterns: module names with `*`, `?` and `[...]`, where `*` also matches dots: "*.down_proj".

    Raises:
        InputError: a pattern matches nothing.
    """
    names = [*table_names(config), *linear_names(config)]
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                "--keep-float",
                "a pattern of module names",
                f"{shown(pattern)}, which matches none",
                _hint(config, pattern, names),
            )
        found |= dict.fromkeys(matched, "float")
    return with_layers(scheme, found)


def fit_groups(config: ModelConfig, scheme: QuantScheme) -> QuantScheme:
    """Return the scheme with a smaller group size for each layer whose inputs its own does not divide.

    A layer gets the largest size that divides; one that no size divides is left, for `packed.layout` to refuse. The
    scheme's group size becomes that of most layers: where all layers shrink alike, no override remains.
    """
    kinds: dict[str, str] = {}
    for name, (_, columns) in (table_names(config) | linear_names(config)).items():
        size = scheme.kind(name).group_size
        if size is not None:
            kinds[name] = f"w4g{fitting_group_size(columns, size) or size}"
    if all(kind == scheme.kind(name).name for name, kind in kinds.items()):
        return scheme
    return replace(scheme, name="custom", group_size=usual_group_size(kinds.values()), layers=scheme.layers | kinds)


def usual_group_size(kinds: Iterable[str]) -> int:
    """Return the group size that most of these keys of `scheme.KINDS` have, the smaller one of two as frequent."""
    counts = Counter(KINDS[kind].group_size for kind in kinds)
    return max(GROUP_SIZES, key=lambda size: (counts[size], -size))


def _hint(config: ModelConfig, pattern: str, names: list[str]) -> str:
    if config.tied and fnmatchcase(HEAD, pattern):
        return f"the head is tied to the embedding; try {EMBEDDING}"
    shapes = [f"*.{name.rpartition('.')[2]}" for name in names]
    blocks = [f"model.layers.{i}.*" for i in range(config.layers)]
    known = list(dict.fromkeys([*shapes, *blocks, *names]))
    near = get_close_matches(pattern, known, _MOST_NAMED, _NEAR)
    return f"try {' or '.join(near or known[:_MOST_NAMED])}"


def count_kinds(config: ModelConfig, scheme: QuantScheme) -> dict[str, int]:
    """Count the linear layers of the blocks that are stored in each way, most first."""
    counts = Counter(scheme.kind(name).name for name in linear_names(config))
    return dict(counts.most_common())


def describe_groups(scheme: Mapping[str, Any]) -> str:
    """Return a scheme's group size from its JSON values, for people: "32", or "32 (4 layers otherwise)"."""
    others = len(scheme.get("layers", ()))
    return f"{scheme['group_size']}" + (f" ({others} layers otherwise)" if others else "")


def describe_kinds(config: ModelConfig, scheme: QuantScheme) -> str:
    """Return `count_kinds` in words: "w4g32 (38), w8 (3), float (1)"."""
    return ", ".join(f"{kind} ({count})" for kind, count in count_kinds(config, scheme).items())
