"""The settings of block tuning (`methods/tune.py`), here so that what needs no Torch can read them."""

from dataclasses import dataclass

from llamita.errors import InputError


@dataclass(frozen=True)
class TuneSettings:
    """Settings "tune.NAME" of a run; docs/methods.md has the measurements behind the defaults.

    Attributes:
        steps: of each of the two descents of a block: scales alone, then codes and scales.
        samples: of the calibration in a step.
        rate: the first step of a place, in hundredths of a code's distance; steps fall linearly to 0. At 0
            codes stay as they are.
        scale_rate: the first step of a scale, in hundredths of its value.
        spread: where places begin: 0 on their codes, 1 where the float weights lie (but within the code).
        held_out: one sample in so many is measured, not learned from.
        checks: how often the held-out samples are measured, all in the second half.
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
                raise InputError(f"--set tune.{name}: expected an integer of at least {least}, got {value!r}")
        for name, most in (("rate", 50.0), ("scale_rate", 50.0), ("spread", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise InputError(f"--set tune.{name}: expected a number from 0 to {most:g}, got {value!r}")

    @property
    def descents(self) -> tuple[float, ...]:
        """The first step of a place in each."""
        return (0.0, self.rate) if self.rate else (0.0,)
