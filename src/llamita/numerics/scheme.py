"""Describe quantization schemes as plain values: which weights are rounded, to how many bits, on which grid.

A scheme is W4A8: int4 weights in groups along each output channel (symmetric, static), int8 activations per token
(asymmetric, at run time). `docs/reference/numerics.md` has the formulas.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llamita.errors import InputError, shown

GROUP_SIZES = (32, 64, 128, 256)  # what XNNPACK, KleidiAI and torchao all take
SCALE_RULES = ("torchao", "search", "weighted")
GIVEN = "given"  # in place of a rule: codes and scales were imported
SCALE_DTYPES = ("float32", "bfloat16")
FLOAT = "none"  # in place of a preset: no rounding


@dataclass(frozen=True)
class LayerKind:
    """Say how one layer's weights are stored: int4 in groups, int8 per channel, or float (no bits)."""

    name: str
    bits: int | None
    group_size: int | None


_ALL_KINDS = (
    *(LayerKind(f"w4g{group_size}", 4, group_size) for group_size in GROUP_SIZES),
    LayerKind("w8", 8, None),
    LayerKind("float", None, None),
)
KINDS = {kind.name: kind for kind in _ALL_KINDS}


def fitting_group_size(columns: int, most: int = max(GROUP_SIZES)) -> int | None:
    """Return the largest group size up to `most` that divides a layer's inputs, None if none does.

    Only `GROUP_SIZES` count, the sizes that packed models have. For 576 inputs that is 64; groups of 96 would save no
    more than 16/64 - 16/96 = 0.08 bits a weight with bf16 scales, and no older version could read them.
    """
    return max((size for size in GROUP_SIZES if size <= most and columns % size == 0), default=None)


def _expect(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(type(value) is type(a) and value == a for a in allowed):  # 32.0 and True are not 32 and 1
        choices = ", ".join(str(a) for a in allowed)
        raise InputError(name, f"one of {choices}", shown(value))


@dataclass(frozen=True)
class QuantScheme:
    """Say how the weights of a model are rounded.

    Attributes:
        name: of a preset, or "custom".
        group_size: consecutive inputs of one output channel that share a scale.
        scale_rule: how scales are chosen: "torchao" (largest weight / 7.5), "search" (least squared error on the
            bf16 grid), "weighted" (likewise, inputs weighted by their expected energy) or "given" (imported from
            another tool, with its codes).
        scale_dtype: "float32" or "bfloat16", the type to which scales are rounded and in which they are stored.
        table_bits: 8 for embedding and head in int8 per channel, None to keep them in float.
        layers: overrides: full module name to a key of `KINDS`. Do not change them; an override that changes
            nothing is dropped, so that equal schemes compare equal.
    """

    name: str
    group_size: int
    scale_rule: str
    scale_dtype: str
    table_bits: int | None
    layers: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable():
            raise InputError("scheme: name", "text", shown(self.name))
        _expect("group_size", self.group_size, GROUP_SIZES)
        _expect("scale_rule", self.scale_rule, (*SCALE_RULES, GIVEN))
        _expect("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _expect("table_bits", self.table_bits, (8, None))
        if self.scale_rule not in ("torchao", GIVEN) and self.scale_dtype != "bfloat16":
            raise InputError("scale_dtype", f"bfloat16 with scales '{self.scale_rule}'", self.scale_dtype)
        if not isinstance(self.layers, dict):
            raise InputError("layers", "module names with kinds", type(self.layers).__name__)
        for name, kind in self.layers.items():
            _expect(f"layers: {shown(name)}", kind, tuple(KINDS))
        changed = {name: kind for name, kind in self.layers.items() if kind != self._usual(name)}
        object.__setattr__(self, "layers", dict(sorted(changed.items())))

    def kind(self, name: str) -> LayerKind:
        """Return how the weights of a linear layer or table are stored, by its full module name."""
        return KINDS[self.layers.get(name) or self._usual(name)]

    def _usual(self, name: str) -> str:
        if name.startswith("model.layers."):
            return f"w4g{self.group_size}"
        return "w8" if self.table_bits else "float"

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme as JSON values, without the key `layers` if it is empty; `from_dict` is the inverse."""
        values = asdict(self)
        return values if self.layers else {key: values[key] for key in values if key != "layers"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantScheme":
        """Read a scheme from JSON values; unknown or missing keys raise InputError."""
        expected = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or {*values, "layers"} != expected:
            found = shown(sorted(values), 400) if isinstance(values, dict) else type(values).__name__
            raise InputError("scheme", f"the keys {sorted(expected)}", found)
        return cls(**values)


PRESETS = {
    "arm": QuantScheme("arm", 128, "torchao", "float32", None),
    "llama3.2": QuantScheme("llama3.2", 32, "search", "bfloat16", 8),
    "llamita": QuantScheme("llamita", 32, "weighted", "bfloat16", 8),
}


def make_scheme(preset: str, group_size: int | None = None, scale_rule: str | None = None) -> QuantScheme:
    """Return a preset's scheme, with its group size or scale rule replaced if they are given.

    Raises:
        InputError: unknown preset, group size or rule.
    """
    _expect("--preset", preset, tuple(PRESETS))
    scheme = PRESETS[preset]
    if group_size is not None:
        _expect("--group-size", group_size, GROUP_SIZES)
        scheme = replace(scheme, group_size=group_size)
    if scale_rule is not None:
        _expect("--scales", scale_rule, SCALE_RULES)
        # torchao's rule keeps FP32 scales only if the preset does; a search uses the bf16 grid.
        dtype = scheme.scale_dtype if scale_rule == "torchao" else "bfloat16"
        scheme = replace(scheme, scale_rule=scale_rule, scale_dtype=dtype)
    if scheme == PRESETS[preset] or (preset == "arm" and scheme.group_size == 256 and scale_rule is None):
        return scheme
    return replace(scheme, name="custom")


def choose_scheme(preset: str, group_size: int | None = None) -> QuantScheme | None:
    """Return the scheme of `make_scheme`, or None for "none".

    Raises:
        InputError: unknown preset or group size, or a group size for "none".
    """
    _expect("--preset", preset, (*PRESETS, FLOAT))
    if preset != FLOAT:
        return make_scheme(preset, group_size)
    if group_size is not None:
        raise InputError("--group-size", "a scheme that rounds", "none")
    return None
