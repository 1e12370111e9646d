"""The settings of every method, which `--set METHOD.NAME=VALUE` changes: defaults and limits.

They are apart from the methods, so that a mistake is reported and the cost estimated before Torch is imported or any
work is done. docs/reference/methods.md has the measurements behind the defaults.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.numerics.hadamard import factor
from llamita.numerics.rotations import NAMES

Numbers = dict[str, float]
GPTQ: Numbers = {
    "damping": 0.05,  # share of its own energy added to every input's, because correlations are estimates
    "sweeps": 1,  # passes of coordinate descent after the greedy codes
}
QRONOS: Numbers = {
    "strength": 0.75,  # factor of the correction for inputs
    "residual": 0.5,  # factor of the correction for the residual stream
    "ridge": 0.05,  # share of the inputs' mean energy
}
CHECKED = 16  # samples on which spinquant compares its learned rotations with the random ones
LOSSES = ("kl", "cross-entropy")
DTYPES = ("float32", "bfloat16")
READ_BY = {"qronos": ("gptq", "qronos")}  # a method that also reads the settings of another


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Dataclass)


@dataclass(frozen=True)
class SpinQuantSettings:
    """Settings "spinquant.NAME" of a run.

    Attributes:
        rotations: which of R1, R2, R4 to use.
        online: whether the model may rotate at run time. If not, R4 is left out, and a head under R1 has its own table.
        steps: of learning; 0 keeps the random Hadamard matrices.
        lr: learning rate, the angle in radians by which a step turns; it falls linearly to 0.
        batch: samples of the calibration text in a step, in all processes together; each takes an equal share.
        loss: "kl" for the divergence from the float model on the text, or "cross-entropy", as in Meta's code.
        dtype: of products and of the weights in memory while rotations are learned; rotations are float32.
        weights: group size in which weights are rounded, too, while rotations are learned; 0 leaves them in float.
    """

    rotations: str = "R1,R2,R4"
    online: bool = True
    steps: int = 200
    lr: float = 0.2
    batch: int = 1
    loss: str = "kl"
    dtype: str = "float32"
    weights: int = 32

    def __post_init__(self) -> None:
        if not self.online and not self.names and replace(self, online=True).names == ("R4",):
            raise InputError(
                "spinquant.rotations", "R1 or R2 with --no-runtime-rotation", "R4 alone, which acts at run time"
            )
        if not self.names or self.names != tuple(name for name in NAMES if name in self.names):
            raise InputError("spinquant.rotations", "some of R1,R2,R4", f"{self.rotations!r}")
        for name, least in (("steps", 0), ("batch", 1), ("weights", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"spinquant.{name}", f"a whole number from {least}", f"{value!r}")
        if not isinstance(self.lr, int | float) or not 0 < self.lr < float("inf"):
            raise InputError("spinquant.lr", "a positive number", f"{self.lr!r}")
        for name, known in (("loss", LOSSES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"spinquant.{name}", f"one of {', '.join(known)}", f"{value!r}")
        if not isinstance(self.online, bool):
            raise InputError("spinquant.online", "true or false", f"{self.online!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The rotations, without R4 where the model may not rotate at run time."""
        if not isinstance(self.rotations, str):
            return ()
        names = tuple(name.strip() for name in self.rotations.split(","))
        return tuple(name for name in names if self.online or name != "R4")

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """Return the size of every rotation in use.

        Raises:
            InputError: there is no Hadamard matrix of that size.
        """
        sizes = {"R1": config.hidden_size, "R2": config.head_dim, "R4": config.intermediate_size}
        for name in self.names:
            try:
                factor(sizes[name])
            except InputError:
                hint = "try --no-runtime-rotation" if name == "R4" else "try --set spinquant.rotations without it"
                raise InputError(
                    f"spinquant: {name}", "a size with a known Hadamard matrix", f"{sizes[name]}", hint
                ) from None
        return {name: sizes[name] for name in self.names}

    @property
    def learns(self) -> bool:
        """Whether there are rotations to learn; R4 is fixed."""
        return self.steps > 0 and any(name in self.names for name in ("R1", "R2"))

    def shape(self, config: ModelConfig) -> tuple[ModelConfig, str | None]:
        """Return the rotated model's configuration, and the dtype of the matrix in front of its head, if any.

        Without rotation at run time, R1 gives a tied head a table of its own.
        """
        if not config.tied or "R1" not in self.names:
            return config, None
        return (config, "BF16") if self.online else (replace(config, tied=False), None)


@dataclass(frozen=True)
class TuneSettings:
    """Settings "tune.NAME" of a run.

    Attributes:
        steps: steps of each of the two descents of a block: scales alone, then codes and scales.
        samples: calibration samples in a step.
        rate: the first step of a place, in hundredths of the distance between codes; steps fall linearly to 0.
            At 0 codes do not change.
        scale_rate: the first step of a scale, in hundredths of its value.
        spread: where places begin: 0 on their codes, 1 on the float weights (but within the code).
        held_out: one sample in this many is measured instead of learned from.
        checks: how often the held-out samples are measured, always in the second half.
    """

    steps: int = 100
    samples: int = 2
    rate: float = 4.0
    scale_rate: float = 0.1
    spread: float = 1.0
    held_out: int = 8
    checks: int = 4

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("samples", 1), ("held_out", 2), ("checks", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"tune.{name}", f"a whole number from {least}", f"{value!r}")
        for name, most in (("rate", 50.0), ("scale_rate", 50.0), ("spread", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                raise InputError(f"tune.{name}", f"a number from 0 to {most:g}", f"{value!r}")

    @property
    def descents(self) -> tuple[float, ...]:
        """The first step of a place in each descent."""
        return (0.0, self.rate) if self.rate else (0.0,)


def check_settings(methods: Collection[str], settings: dict[str, Any]) -> None:
    """Check that every setting belongs to one of these methods and has an accepted value.

    Raises:
        InputError: one does not.
    """
    known = list(dict.fromkeys(read for name in methods for read in READ_BY.get(name, (name,)) if read in KINDS))
    for name, value in settings.items():
        method = name.partition(".")[0]
        if method not in known:
            raise InputError(f"{name}={value}", f"a setting of {', '.join(known)}", f"one of {method}")
    for method in known:
        kind = KINDS[method]
        if isinstance(kind, dict):
            numbers_of(settings, method, kind)
        else:
            settings_of(kind, method, settings)


def settings_of(kind: type[S], method: str, settings: dict[str, Any]) -> S:
    """Return a method's settings as its dataclass, where "method.NAME" is NAME; those not given have their defaults.

    Raises:
        InputError: a setting that the method does not have, or a value that the dataclass refuses.
    """
    return kind(**_own(settings, method, list(kind.__dataclass_fields__)))


def numbers_of(settings: dict[str, Any], method: str, defaults: Numbers) -> Numbers:
    """Return a method's settings where they are numbers of at least 0; those not given are as in `defaults`.

    Raises:
        InputError: a setting that the method does not have, or a value that is no such number.
    """
    given = _own(settings, method, defaults)
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise InputError(f"{method}.{name}", "a number of at least 0", f"{value!r}")
        if type(defaults[name]) is int and value != int(value):
            raise InputError(f"{method}.{name}", "a whole number", f"{value!r}")
    return {name: float(given.get(name, default)) for name, default in defaults.items()}


def _own(settings: dict[str, Any], method: str, known: Collection[str]) -> dict[str, Any]:
    start = f"{method}."
    own = {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
    for name in own:
        if name not in known:
            choices = f"one of {', '.join(known)}" if known else f"no settings of {method}, which has none"
            raise InputError(f"{method}.{name}", choices)
    return own


KINDS: dict[str, Any] = {  # numbers with their defaults, or a dataclass
    "rtn": {},
    "equalize": {},
    "gptq": GPTQ,
    "qronos": QRONOS,
    "spinquant": SpinQuantSettings,
    "tune": TuneSettings,
}
