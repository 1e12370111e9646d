"""Chains of methods, such as `equalize+spinquant+qronos+tune`.

First come transforms, which change the float weights and keep the model's function; then one rounding method ("rtn"
where none is named); then tuning. `METHODS` names functions as "module:function" and imports them on use, because
some need Torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any

from llamita.errors import InputError
from llamita.methods.rtn import RoundModule
from llamita.methods.settings import SpinQuantSettings, check_settings, settings_of
from llamita.methods.setup import Setup
from llamita.models.config import ModelConfig
from llamita.models.weights import FloatSource
from llamita.numerics.scheme import QuantScheme
from llamita.system import processes
from llamita.system.extras import load_optional


class Stage(IntEnum):
    """Where a method acts in a chain, which has at most one method for each stage."""

    EQUALIZE = 0
    ROTATE = 1
    ROUND = 2
    TUNE = 3


@dataclass(frozen=True)
class Method:
    """One method: its stage, and its function as "module:function" under the name of the contract that it keeps.

    Attributes:
        stage: where it acts.
        transform: takes (source, setup) and returns a `FloatSource` with the same function.
        rounder: takes (source, scheme) and returns a `RoundModule`; it looks at the weights of a module alone.
        layer_method: takes the settings and returns a `blockwise.LayerMethod`, which looks at measured inputs.
        tune_block: is a `blockwise.TuneBlock`, which looks at a rounded block and its inputs.
        is_random: whether the seed changes the result.
    """

    stage: Stage
    transform: str | None = None
    rounder: str | None = None
    layer_method: str | None = None
    tune_block: str | None = None
    is_random: bool = True

    @property
    def is_blockwise(self) -> bool:
        """Whether it works block by block, on hidden states of calibration text."""
        return self.layer_method is not None or self.tune_block is not None


METHODS = {
    "rtn": Method(Stage.ROUND, rounder="llamita.methods.rtn:rounder", is_random=False),
    "gptq": Method(Stage.ROUND, layer_method="llamita.methods.gptq:layer_method"),
    "qronos": Method(Stage.ROUND, layer_method="llamita.methods.qronos:layer_method"),
    "trained": Method(Stage.ROUND, rounder="llamita.methods.trained:rounder", is_random=False),
    "equalize": Method(Stage.EQUALIZE, transform="llamita.methods.equalize:transform", is_random=False),
    "spinquant": Method(Stage.ROTATE, transform="llamita.methods.spinquant:transform"),
    "tune": Method(Stage.TUNE, tune_block="llamita.methods.tune:tune_block"),
}
TRANSFORMS = tuple(name for name, method in METHODS.items() if method.transform)
LEARNER = "llamita.methods.spinquant:learner"  # returns what learns rotations, or raises what that needs
BLOCKWISE = "llamita.methods.blockwise:rounder"  # runs every layer method and tuning

# The method that a preset adds to its scheme, with settings; presets that are not named here round to nearest.
PRESET_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "llamita": ("equalize+spinquant+qronos+tune", {"spinquant.rotations": "R4", "tune.rate": 0})
}
# The same for models that must not rotate at run time.
PLAIN_METHODS: dict[str, tuple[str, dict[str, Any]]] = {"llamita": ("equalize+qronos+tune", {"tune.rate": 0})}

_RULES = {
    "torchao": "the largest weight of the group over 7.5 (torchao's formula)",
    "search": "least squared error among all bf16 values",
    "weighted": "least squared error among all bf16 values, inputs weighted by their expected energy",
}
_MEASURED = "least squared error among all bf16 values, inputs weighted by their measured energy"
_TRAINED = "chosen before training"
_TUNED = "; then tuned by descent on each block's output"


@dataclass(frozen=True)
class Chain:
    """Names of methods in the order in which they act."""

    transforms: tuple[str, ...]
    rounding: str
    tuning: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them; "rtn" only where there is nothing else."""
        rounding = () if self.rounding == "rtn" and (self.transforms or self.tuning) else (self.rounding,)
        return (*self.transforms, *rounding, *([self.tuning] if self.tuning else []))

    @property
    def is_blockwise(self) -> bool:
        """Whether weights are rounded block by block, on hidden states."""
        return any(METHODS[name].is_blockwise for name in self.names)

    @property
    def is_random(self) -> bool:
        """Whether the seed changes the result."""
        return any(METHODS[name].is_random for name in self.names)

    def learns(self, settings: dict[str, Any]) -> bool:
        """Return whether rotations are learned, on the whole model."""
        return "spinquant" in self.transforms and self._rotations(settings).learns

    def needs_calibration(self, settings: dict[str, Any]) -> bool:
        """Return whether some method, with these settings, looks at activations."""
        return self.is_blockwise or self.learns(settings)

    def scales(self, rule: str) -> str:
        """Describe for people how scales are chosen under this rule."""
        if self.rounding == "trained":
            return _TRAINED
        measures = rule != "torchao" and METHODS[self.rounding].is_blockwise
        return (_MEASURED if measures else _RULES[rule]) + (_TUNED if self.tuning else "")

    def shape(self, config: ModelConfig, settings: dict[str, Any]) -> tuple[ModelConfig, str | None]:
        """Return the configuration after the transforms, and the dtype of the matrix before the head, if any."""
        return self._rotations(settings).shape(config) if "spinquant" in self.transforms else (config, None)

    def _rotations(self, settings: dict[str, Any]) -> SpinQuantSettings:
        return settings_of(SpinQuantSettings, "spinquant", settings)

    def __str__(self) -> str:
        return "+".join(self.names)


def parse_chain(text: str) -> Chain:
    """Return the chain that a user wrote.

    Raises:
        InputError: an unknown name, two methods of one stage, or a wrong order.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in METHODS:
            raise InputError("--method", f"one of {', '.join(METHODS)}, or several joined by +", f"{name!r}")
    for before, after in pairwise(names):
        if METHODS[before].stage == METHODS[after].stage:
            alike = ", ".join(_at(METHODS[before].stage, METHODS))
            raise InputError("--method", f"at most one of {alike}", f"{text!r}")
    ordered = sorted(names, key=lambda name: METHODS[name].stage)
    if ordered != names:
        raise InputError("--method", "another order", f"{text!r}", f"try {'+'.join(ordered)}")
    rounding = next(iter(_at(Stage.ROUND, names)), "rtn")
    if rounding == "trained" and len(names) > 1:
        raise InputError("--method", "trained alone, as its codes are fixed", f"{text!r}")
    transforms = tuple(name for name in names if name in TRANSFORMS)
    return Chain(transforms, rounding, next(iter(_at(Stage.TUNE, names)), None))


def _at(stage: Stage, names: Iterable[str]) -> list[str]:
    return [name for name in names if METHODS[name].stage == stage]


def choose_chain(
    preset: str, method: str | None, settings: dict[str, Any], runtime_rotation: bool = True
) -> tuple[Chain, dict[str, Any]]:
    """Return the chain called `method`, or else the preset's, and the settings of the run.

    Args:
        settings: those of the user; they override the preset's.
        runtime_rotation: whether the model may rotate activations at run time.

    Raises:
        InputError: no such chain or setting, or no rotation that `runtime_rotation` could leave out.
    """
    presets = PRESET_METHODS if runtime_rotation else PRESET_METHODS | PLAIN_METHODS
    named, defaults = (method, {}) if method else presets.get(preset, ("rtn", {}))
    chain, chosen = parse_chain(named), defaults | settings
    if not runtime_rotation and (method or preset not in PLAIN_METHODS):
        if "spinquant" not in chain.names:
            raise InputError(
                "--no-runtime-rotation", "a method with spinquant", f"{chain}", "try without --no-runtime-rotation"
            )
        chosen["spinquant.online"] = False
    check_settings(chain.names, chosen)
    return chain, chosen


def check_sizes(chain: Chain, settings: dict[str, Any], config: ModelConfig) -> None:
    """Raise InputError if a rotation of the chain has no matrix for a size of the model."""
    if "spinquant" in chain.transforms:
        settings_of(SpinQuantSettings, "spinquant", settings).sizes(config)


def check_chain(chain: Chain, settings: dict[str, Any], config: ModelConfig) -> None:
    """Check that the chain can run here, before any work is done: sizes, packages, processes.

    Args:
        settings: those that `check_settings` has accepted.

    Raises:
        InputError: a size that cannot be rotated, or several processes where a method takes one.
        RunError: a package of the Torch side is missing.
    """
    check_sizes(chain, settings, config)
    if chain.tuning and processes.world() > 1:
        kept = [
            " --no-runtime-rotation" if (name, value) == ("spinquant.online", False) else f" --set {name}={value}"
            for name, value in settings.items()
            if name.split(".")[0] != chain.tuning
        ]
        raise InputError(
            f"method {chain}",
            f"a single process for {chain.tuning}",
            f"{processes.world()}",
            f"try --method {replace(chain, tuning=None)}{''.join(kept)}",
        )
    rounding = METHODS[chain.rounding]
    _load(chain.rounding, rounding.rounder or rounding.layer_method)
    if chain.is_blockwise:
        _load(str(chain), BLOCKWISE)
    if chain.tuning:
        _load(chain.tuning, METHODS[chain.tuning].tune_block)
    if chain.learns(settings):
        _load(str(chain), LEARNER)()


def transform(source: FloatSource, chain: Chain, setup: Setup) -> FloatSource:
    """Return the source after the chain's transforms.

    Raises:
        RunError: a package of the Torch side is missing.
    """
    for name in chain.transforms:
        source = _load(name, METHODS[name].transform)(source, setup)
    return source


def rounder(source: FloatSource, scheme: QuantScheme, chain: Chain, setup: Setup) -> RoundModule:
    """Return the function that gives the rounded rows of a module by its name; `source` is already transformed.

    Raises:
        RunError: a package of the Torch side is missing.
    """
    rounding = METHODS[chain.rounding]
    if not chain.is_blockwise:
        return _load(chain.rounding, rounding.rounder)(source, scheme)
    layer_method = None
    if rounding.layer_method:
        layer_method = _load(chain.rounding, rounding.layer_method)(setup.settings)
    tune_block = _load(chain.tuning, METHODS[chain.tuning].tune_block) if chain.tuning else None
    return _load(str(chain), BLOCKWISE)(source, scheme, setup, layer_method, tune_block)


def _load(name: str, entry: str | None) -> Any:
    assert entry is not None, f"{name} has no such function"
    return load_optional(
        entry,
        f"method {name}: expected the package {{package}}, found none; try pip install "
        "'llamita[torch]' (in a checkout '.[torch]'), or --method rtn, which needs none",
    )
