"""Read, check and change recipes: small YAML files with every setting of a fine-tuning, in stages."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from llamita.errors import InputError, shown
from llamita.numerics.scheme import GROUP_SIZES, PRESETS
from llamita.system.files import unreadable
from llamita.text.printable import counted

METHODS = {"lora": "lora", "full": "sft", "qat": "qat", "qat-lora": "llama3.2-qat-lora"}  # the recipe of each
RECIPES = Path(__file__).parent / "recipes"
TRAINS = ("weights", "adapters")
_FORMER_TRAINS = {"adaptors": "adapters"}  # the former spelling, in recipes and records of earlier runs
OBJECTIVES = ("answers", "preferences")
SCHEDULES = ("linear", "cosine", "constant_with_warmup")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RANGES = (
    ("epochs", 0.001, 1000.0), ("learning_rate", 1e-9, 1.0), ("warmup", 0.0, 1.0), ("weight_decay", 0.0, 1.0),
    ("distill", 0.0, 1.0), ("beta", 0.001, 10.0),
)  # fmt: skip
_FRACTIONS = (*(name for name, _, _ in _RANGES), "held_out")
_ONLY_FOR_ANSWERS = ("distill", "fake_quant_after")  # not for stages with preferences
_LARGEST = 1 << 16  # bytes of a recipe


@dataclass(frozen=True)
class Stage:
    """One training run; the next stage begins with its result.

    Attributes:
        train: "weights" trains all weights; "adapters" trains low-rank adapters of a model that stays as it is (LoRA,
            Hu et al. 2021, arXiv 2106.09685).
        objective: "answers" learns the answers of the data; "preferences" learns from pairs of answers of which one
            is preferred, with adapters only.
        quantized: from this stage on, the model computes as the packed model will.
        fake_quant_after: the steps of this stage before rounding begins.
        epochs: passes over the data; `steps`, if given, overrides them.
        batch: rows of a step, over all processes; `micro_batch` of them at a time.
        learning_rate: the highest; it rises over `warmup`, a share of the steps, and then falls by `schedule`.
        distill: the weight in the loss of the KL divergence from the teacher; the data's cross-entropy has the rest.
        beta: how much a stage with preferences is penalized for moving away from its start (DPO's β).
        rank, alpha: of adapters; their output is multiplied by alpha / rank.
        targets: the linear layers of a block that have adapters.
    """

    train: str = "weights"
    objective: str = "answers"
    quantized: bool = False
    fake_quant_after: int = 0
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 16
    micro_batch: int = 4
    learning_rate: float = 2e-5
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    distill: float = 0.0
    beta: float = 0.1
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        _one_of("train", self.train, TRAINS)
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("schedule", self.schedule, SCHEDULES)
        for name in ("batch", "micro_batch", "rank", "alpha"):
            _integer(name, getattr(self, name), 1)
        _integer("fake_quant_after", self.fake_quant_after, 0)
        if self.steps is not None:
            _integer("steps", self.steps, 1)
        for name, least, most in _RANGES:
            _number(name, getattr(self, name), least, most)
        if self.batch % self.micro_batch:
            hint = f"try --set micro_batch={math.gcd(self.batch, self.micro_batch)} too"
            raise InputError("batch", f"a multiple of micro_batch, {self.micro_batch}", f"{self.batch}", hint)
        if self.prefers and (self.train != "adapters" or self.distill or self.fake_quant_after):
            raise InputError("objective: preferences", "train: adapters, no distill and no fake_quant_after")
        targets: object = self.targets
        if not isinstance(targets, tuple) or not targets or any(target not in LINEARS for target in targets):
            raise InputError("targets", f"some of {', '.join(LINEARS)}", shown(targets))
        if type(self.quantized) is not bool:
            raise InputError("quantized", "true or false", shown(self.quantized))

    @property
    def prefers(self) -> bool:
        """Whether the stage learns from preferences."""
        return self.objective == "preferences"

    def count_steps(self, rows: int) -> int:
        """Return `steps`, or the steps of `epochs` passes over `rows` rows; the last step of a pass may be smaller."""
        return self.steps or max(1, round(self.epochs * math.ceil(rows / self.batch)))


@dataclass(frozen=True)
class Recipe:
    """Every setting of a fine-tuning: recipe, data and seed decide the result.

    Attributes:
        preset, group_size: the scheme of quantized stages, as `llamita quantize` takes it.
        start: the chain of methods that rounds the model where the first quantized stage begins, calibrated on the
            data.
        length: tokens of a row; examples are packed whole.
        held_out: the share of the examples that is only measured, not learned.
        evaluate_every: steps between measurements; 0 measures only at the end, as stages with preferences always do.
        save_every: steps between checkpoints, from which a killed run resumes.
        patience: end a stage after this many measurements without gain; None never ends early.
        fit_groups: give layers that `group_size` does not divide the next smaller size that does.
    """

    stages: tuple[Stage, ...]
    preset: str = "llama3.2"
    group_size: int | None = None
    start: str = "rtn"
    length: int = 512
    held_out: float = 0.05
    evaluate_every: int = 0
    save_every: int = 100
    patience: int | None = None
    fit_groups: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("stages", "at least one", "none")
        _one_of("preset", self.preset, tuple(PRESETS))
        if self.group_size is not None:
            _one_of("group_size", self.group_size, GROUP_SIZES)
        _integer("length", self.length, 2)
        _number("held_out", self.held_out, 0.0, 0.5)
        _integer("evaluate_every", self.evaluate_every, 0)
        if self.evaluate_every and not self.held_out:
            raise InputError("evaluate_every", "held_out above 0", shown(self.held_out))
        _integer("save_every", self.save_every, 1)
        if self.patience is not None:
            _integer("patience", self.patience, 1)
            if not self.evaluate_every:
                raise InputError("patience", "evaluate_every above 0", shown(self.evaluate_every))
        if type(self.fit_groups) is not bool:
            raise InputError("fit_groups", "true or false", shown(self.fit_groups))
        self._check_order()

    def _check_order(self) -> None:
        kinds = [stage.train for stage in self.stages]
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if (before.train != "weights" and not after.prefers) or before.prefers:
                raise InputError("stages", "adapters once and, except for preferences, last", ", ".join(kinds))
            if before.quantized and not after.quantized:
                raise InputError("stages", "quantized stages last", "a float stage after one")

    def without_preferences(self) -> "Recipe":
        """Return the recipe without its stages that learn from preferences."""
        return replace(self, stages=tuple(stage for stage in self.stages if not stage.prefers))

    @property
    def prefers(self) -> bool:
        """Whether a stage learns from preferences."""
        return any(stage.prefers for stage in self.stages)

    def check_steps(self, rows: int, pairs: int) -> None:
        """Raise InputError if a stage over this much data would end before its rounding begins."""
        for number, stage in enumerate(self.stages, 1):
            steps = stage.count_steps(pairs if stage.prefers else rows)
            if stage.quantized and stage.fake_quant_after >= steps:
                where, hint = f"stage {number}: fake_quant_after", f"try --set {number}.fake_quant_after=0"
                raise InputError(where, f"less than its {counted(steps, 'step')}", str(stage.fake_quant_after), hint)

    @property
    def is_quantized(self) -> bool:
        """Whether the result is a 4-bit model."""
        return self.stages[-1].quantized

    @property
    def has_adapters(self) -> bool:
        """Whether the result has adapters."""
        return self.stages[-1].train != "weights"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and YAML, without `fit_groups` if it is off, as older versions wrote them."""
        values = asdict(self)
        if not self.fit_groups:
            del values["fit_groups"]
        for stage in values["stages"]:
            stage["targets"] = list(stage["targets"])
        values["stages"] = list(values["stages"])
        return values


def adapter_place(out: Path) -> Path:
    """Return the directory of the adapters that belong to the packed model at `out`."""
    return out.with_name(f"{out.name}-adapter")


def read_recipe(name: str) -> Recipe:
    """Read one of our recipes by its name, or a YAML file.

    Raises:
        InputError: there is no such recipe, or a setting is unknown or has a wrong value.
    """
    known = RECIPES / f"{name}.yaml"
    path = known if known.is_file() and "/" not in name else Path(name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InputError("--recipe", f"{names}, or a YAML file", name) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if len(data) > _LARGEST:
        raise InputError(name, f"at most {_LARGEST} bytes", f"{len(data)}")
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(name, "YAML", " ".join(str(error).split())) from None
    return parse_recipe(values, name)


def parse_recipe(values: Any, where: str = "recipe") -> Recipe:
    """Make a recipe from plain values. Raises InputError, which names `where`."""
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise InputError(where, "settings with a list of stages")
    stages = []
    for number, stage in enumerate(values["stages"], 1):
        place = f"{where}: stage {number}"
        if not isinstance(stage, dict):
            raise InputError(place, "settings", shown(stage))
        stages.append(_made(Stage, _renamed(stage), place))
    return _made(Recipe, values | {"stages": tuple(stages)}, where)


def change(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """Return the recipe with settings changed as a user wrote them.

    Args:
        texts: NAME=VALUE for the recipe or all its stages, N.NAME=VALUE for stage N.

    Raises:
        InputError: a text is not NAME=VALUE, there is no such setting or stage, or a value is wrong.
    """
    whole: dict[str, Any] = recipe.to_dict() | {"fit_groups": recipe.fit_groups}
    for text in texts:
        name, equals, value = text.partition("=")
        number, dot, rest = name.partition(".")
        if not equals:
            raise InputError("--set", "NAME=VALUE, such as learning_rate=1e-4", shown(text))
        stages = whole["stages"]
        if dot:
            if not number.isdecimal() or not 1 <= int(number) <= len(stages):
                raise InputError(f"--set {text}", f"a stage from 1 to {len(stages)}", shown(number))
            name, stages = rest, [stages[int(number) - 1]]
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = value
        known = [field.name for field in fields(Stage)]
        if name not in known and (dot or name not in whole):
            names = known if dot else [*(n for n in whole if n != "stages"), *known]
            raise InputError("--set", f"settings among {', '.join(names)}", shown(name), _nearest(name, names))
        if not dot and name in whole and name != "stages":
            whole[name] = read
        else:
            for stage in stages:
                if dot or name not in _ONLY_FOR_ANSWERS or stage["objective"] == "answers":
                    stage[name] = read
    return parse_recipe(whole, "--set")


def _nearest(name: str, known: list[str]) -> str | None:
    """Return a hint for a name that is almost one of these, None if it is not."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else None


def _made(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise InputError(where, f"settings among {', '.join(known)}", shown(name), _nearest(str(name), known))
    if isinstance(values.get("targets"), list):
        values = values | {"targets": tuple(values["targets"])}
    for name in _FRACTIONS:  # YAML 1.1 reads 1e-4, which has no point, as a text
        if isinstance(values.get(name), str) and _is_number(values[name]):
            values = values | {name: float(values[name])}
    try:
        return kind(**values)
    except InputError as error:
        raise error.within(where) from None


def _renamed(stage: dict[str, Any]) -> dict[str, Any]:
    train = stage.get("train")
    return stage | {"train": _FORMER_TRAINS[train]} if isinstance(train, str) and train in _FORMER_TRAINS else stage


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise InputError(name, ", ".join(map(str, allowed)), shown(value))


def _integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(name, f"a whole number of at least {least}", shown(value))


def _number(name: str, value: object, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(name, f"a number from {least:g} to {most:g}", shown(value))
