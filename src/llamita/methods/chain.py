"""A method is a chain: `equalize+spinquant+qronos+tune`.

First transforms, which change the float weights and keep the function, then one rounding method ("rtn"
where none is named), then tuning. Registries name functions as "module:function", imported on use: the
calibrated ones need Torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llamita.errors import InputError
from llamita.methods.settings import SpinQuantSettings, settings_of
from llamita.methods.setup import Setup
from llamita.models.config import ModelConfig
from llamita.numerics.scheme import QuantScheme
from llamita.system import processes
from llamita.system.extras import load_optional

RoundModule = Callable[[str], Iterator[Any]]  # a module's name to its rounded rows, in pieces

# transform(source, setup) -> a source of the same function
TRANSFORMS = {"equalize": "llamita.methods.equalize:transform", "spinquant": "llamita.methods.spinquant:transform"}
# rtn, trained: begin(source, scheme) -> RoundModule
# others: method(settings) -> `methods.calibrated.LayerMethod`
METHODS = {
    "rtn": "llamita.methods.rtn:begin",
    "gptq": "llamita.methods.gptq:method",
    "qronos": "llamita.methods.qronos:method",
    "trained": "llamita.methods.trained:begin",
}
TUNINGS = {"tune": "llamita.methods.tune:tune_block"}  # see `methods.calibrated.TuneBlock`
# What a preset stands for beside its scheme, with settings: round to nearest where it is not here.
PRESET_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "llamita": ("equalize+spinquant+qronos+tune", {"spinquant.rotations": "R4", "tune.rate": 0})
}
OFFLINE_METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # the same where nothing may run online
    "llamita": ("equalize+qronos+tune", {"tune.rate": 0})
}
_RULES = {
    "torchao": "the largest weight of the group over 7.5 (torchao's formula)",
    "search": "least squared error among all bf16 values",
    "weighted": "least squared error among all bf16 values, inputs weighted by their expected energy",
}
_MEASURED = "least squared error among all bf16 values, inputs weighted by their measured energy"
_TRAINED = "chosen before training"
_TUNED = "; then tuned by descent on each block's output"
LEARNER = "llamita.methods.spinquant:learner"  # gives what learns rotations, or says what that needs
CALIBRATED = "llamita.methods.blockwise:begin"
_AT_ONCE = ("rtn", "trained")  # look at the weights of a module alone
_NEED_NO_TEXT = (*_AT_ONCE, "equalize")
_STAGES = {**{name: i for i, name in enumerate(TRANSFORMS)}, **dict.fromkeys(METHODS, len(TRANSFORMS)),
           **dict.fromkeys(TUNINGS, len(TRANSFORMS) + 1)}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Names of methods in the order in which they act."""

    transforms: tuple[str, ...]
    rounding: str
    tuning: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them; "rtn" only where nothing else would be left."""
        rounding = () if self.rounding == "rtn" and (self.transforms or self.tuning) else (self.rounding,)
        return (*self.transforms, *rounding, *([self.tuning] if self.tuning else []))

    @property
    def is_blockwise(self) -> bool:
        """Whether weights are rounded block by block, on hidden states."""
        return self.rounding not in _AT_ONCE or self.tuning is not None

    @property
    def is_random(self) -> bool:
        """Whether the seed makes a difference."""
        return any(name not in _NEED_NO_TEXT for name in self.names)

    def learns(self, settings: dict[str, Any]) -> bool:
        """Whether rotations are learned, on the whole model."""
        return "spinquant" in self.transforms and self._rotations(settings).learns

    def needs_calibration(self, settings: dict[str, Any]) -> bool:
        """Whether some method, so set, looks at activations."""
        return self.is_blockwise or self.learns(settings)

    def scales(self, rule: str) -> str:
        """How scales come about by this rule, for people."""
        if self.rounding == "trained":
            return _TRAINED
        measures = rule != "torchao" and self.rounding not in _AT_ONCE
        return (_MEASURED if measures else _RULES[rule]) + (_TUNED if self.tuning else "")

    def shape(self, config: ModelConfig, settings: dict[str, Any]) -> tuple[ModelConfig, str | None]:
        """The configuration after the transforms, and the dtype of the matrix before the head, if any."""
        return self._rotations(settings).shape(config) if "spinquant" in self.transforms else (config, None)

    def _rotations(self, settings: dict[str, Any]) -> SpinQuantSettings:
        return settings_of(SpinQuantSettings, "spinquant", settings)

    def __str__(self) -> str:
        return "+".join(self.names)


def parse_chain(text: str) -> Chain:
    """The chain that a user wrote.

    Raises:
        InputError: an unknown name, two methods of one stage, or a wrong order.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in _STAGES:
            known = ", ".join([*METHODS, *TRANSFORMS, *TUNINGS])
            raise InputError("--method", f"one of {known}, or several joined by +", f"{name!r}")
    for before, after in pairwise(names):
        if _STAGES[before] == _STAGES[after]:
            both = ", ".join(METHODS) if before in METHODS else before
            raise InputError("--method", f"at most one of {both}", f"{text!r}")
    ordered = sorted(names, key=lambda name: _STAGES[name])
    if ordered != names:
        raise InputError("--method", "another order", f"{text!r}", f"try {'+'.join(ordered)}")
    rounding = next((name for name in names if name in METHODS), "rtn")
    if rounding == "trained" and len(names) > 1:
        raise InputError("--method", "trained alone, as its codes are fixed", f"{text!r}")
    tuning = next((name for name in names if name in TUNINGS), None)
    return Chain(tuple(name for name in names if name in TRANSFORMS), rounding, tuning)


def check_sizes(chain: Chain, settings: dict[str, Any], config: ModelConfig) -> None:
    """Raise InputError for a size of the model that a rotation of the chain has no matrix for."""
    if "spinquant" in chain.transforms:
        settings_of(SpinQuantSettings, "spinquant", settings).sizes(config)


def check(chain: Chain, settings: dict[str, Any], config: ModelConfig) -> None:
    """See that the chain can run here before any work is done: sizes, packages, processes.

    Args:
        settings: as `settings.check` has passed them.

    Raises:
        InputError: a size that cannot be rotated, or several processes where a method takes one.
        RunError: a package of the Torch side is missing.
    """
    check_sizes(chain, settings, config)
    if chain.tuning and processes.world() > 1:
        kept = [
            " --no-online" if (name, value) == ("spinquant.online", False) else f" --set {name}={value}"
            for name, value in settings.items()
            if name.split(".")[0] != chain.tuning
        ]
        raise InputError(
            f"--method {chain}",
            f"a single process for {chain.tuning}",
            f"{processes.world()}",
            f"try --method {replace(chain, tuning=None)}{''.join(kept)}",
        )
    _entry(chain.rounding, METHODS[chain.rounding])
    if chain.is_blockwise:
        _entry(str(chain), CALIBRATED)
    if chain.tuning:
        _entry(chain.tuning, TUNINGS[chain.tuning])
    if chain.learns(settings):
        _entry(str(chain), LEARNER)()


def transform(source: Any, chain: Chain, setup: Setup) -> Any:
    """The source after the chain's transforms.

    Raises:
        RunError: a package of the Torch side is missing.
    """
    for name in chain.transforms:
        source = _entry(name, TRANSFORMS[name])(source, setup)
    return source


def begin(source: Any, scheme: QuantScheme, chain: Chain, setup: Setup) -> RoundModule:
    """The function that gives the rounded rows of a module by its name, transforms having been made.

    Raises:
        RunError: a package of the Torch side is missing.
    """
    rounding = _entry(chain.rounding, METHODS[chain.rounding])
    if not chain.is_blockwise:
        return rounding(source, scheme)
    tune = _entry(chain.tuning, TUNINGS[chain.tuning]) if chain.tuning else None
    layer_method = None if chain.rounding == "rtn" else rounding(setup.settings)
    return _entry(str(chain), CALIBRATED)(source, scheme, setup, layer_method, tune)


def _entry(name: str, entry: str) -> Any:
    return load_optional(
        entry,
        f"--method {name}: expected the package {{package}}, found none; try pip install "
        "'llamita[torch]' (in a checkout '.[torch]'), or --method rtn, which needs none",
    )
