"""Recipes of fine-tuning: small YAML files that hold every setting, in stages that follow each other."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from llamita.errors import InputError, RunError, shown
from llamita.numerics.scheme import GROUP_SIZES, PRESETS

METHODS = {"lora": "lora", "full": "sft", "qat": "qat", "qat-lora": "llama3.2-qat-lora"}  # and their recipes
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
_ANSWERS_ALONE = ("distill", "fake_quant_after")  # settings that stages with preferences have not
_LARGEST = 1 << 16  # bytes of a recipe


@dataclass(frozen=True)
class Stage:
    """One training run; the next begins with what it leaves.

    Attributes:
        train: "weights", all of the model's; "adapters", low-rank ones beside a model that stays as it is
            (LoRA, Hu et al. 2021, arXiv 2106.09685).
        objective: "answers", which are learned; "preferences", pairs of answers one of which is preferred,
            for adapters alone.
        quantized: whether the model computes, from here on, as its quantized self will.
        fake_quant_after: steps of this stage before it does.
        epochs: times that the data is seen; `steps`, where given, counts instead.
        batch: rows of a step, over all processes; `micro_batch` of them at a time.
        learning_rate: at its height: it rises over `warmup`, a share of the steps, and falls by `schedule`.
        distill: the weight of the teacher's KL in the loss, the data's cross-entropy having the rest.
        beta: how dear it is to stray from where preferences began (DPO's β).
        rank, alpha: of adapters: their part is multiplied by alpha / rank.
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
            raise InputError("batch", f"a multiple of micro_batch, {self.micro_batch}", f"{self.batch}")
        if self.prefers and (self.train != "adapters" or self.distill or self.fake_quant_after):
            raise InputError("objective: preferences", "train: adapters beside it, no distill and no fake_quant_after")
        self._check_targets()

    def _check_targets(self) -> None:
        if (
            not isinstance(self.targets, tuple)
            or not self.targets
            or any(target not in LINEARS for target in self.targets)
        ):
            raise InputError("targets", f"some of {', '.join(LINEARS)}", f"{self.targets!r}")
        if type(self.quantized) is not bool:
            raise InputError("quantized", "true or false", f"{self.quantized!r}")

    @property
    def prefers(self) -> bool:
        """Whether it learns from preferences."""
        return self.objective == "preferences"

    def count_steps(self, rows: int) -> int:
        """Steps that `epochs` over so many rows take, the last of each with what is left, or `steps`."""
        return self.steps or max(1, round(self.epochs * math.ceil(rows / self.batch)))


@dataclass(frozen=True)
class Recipe:
    """Every setting of a fine-tuning: with data and seed it gives the result.

    Attributes:
        preset, group_size: the scheme of stages that are quantized, as `llamita quantize` takes it.
        start: the chain of methods that rounds the model where such a stage begins, calibrated on the data.
        length: tokens of a row, in which examples are packed whole.
        held_out: the share of the examples that is not learned from, only measured.
        evaluate_every: steps from one measurement to the next; 0 measures at the end alone, as stages that
            learn from preferences do.
        save_every: steps after which a killed run can go on.
        patience: measurements without gain after which a stage ends; None never ends early.
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

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("stages", "one at least", "none")
        _one_of("preset", self.preset, tuple(PRESETS))
        if self.group_size is not None:
            _one_of("group_size", self.group_size, GROUP_SIZES)
        _integer("length", self.length, 2)
        _number("held_out", self.held_out, 0.0, 0.5)
        _integer("evaluate_every", self.evaluate_every, 0)
        if self.evaluate_every and not self.held_out:
            raise InputError("evaluate_every", "held_out beside it", "none")
        _integer("save_every", self.save_every, 1)
        if self.patience is not None:
            _integer("patience", self.patience, 1)
            if not self.evaluate_every:
                raise InputError("patience", "evaluate_every beside it", "none")
        self._check_order()

    def _check_order(self) -> None:
        kinds = [stage.train for stage in self.stages]
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if (before.train != "weights" and not after.prefers) or before.prefers:
                raise InputError("stages", "adapters once and, but for preferences, last", f"{', '.join(kinds)}")
            if before.quantized and not after.quantized:
                raise InputError("stages", "quantized stages last", "a float one behind them")

    def without_preferences(self) -> "Recipe":
        """The stages that need none."""
        return replace(self, stages=tuple(stage for stage in self.stages if not stage.prefers))

    @property
    def prefers(self) -> bool:
        """Whether a stage learns from preferences."""
        return any(stage.prefers for stage in self.stages)

    def check_steps(self, rows: int, pairs: int) -> None:
        """Raise InputError if a stage over so much data would end before its rounding begins."""
        for number, stage in enumerate(self.stages, 1):
            steps = stage.count_steps(pairs if stage.prefers else rows)
            if stage.quantized and stage.fake_quant_after >= steps:
                raise InputError(
                    f"stage {number}: fake_quant_after",
                    f"less than its {steps} steps",
                    f"{stage.fake_quant_after}",
                    f"try --set {number}.fake_quant_after=0",
                )

    @property
    def is_quantized(self) -> bool:
        """Whether the result is a 4-bit model."""
        return self.stages[-1].quantized

    @property
    def has_adapters(self) -> bool:
        """Whether the result has adapters."""
        return self.stages[-1].train != "weights"

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML have it."""
        values = asdict(self)
        for stage in values["stages"]:
            stage["targets"] = list(stage["targets"])
        values["stages"] = list(values["stages"])
        return values


def adapter_place(out: Path) -> Path:
    """Where the adapters of a quantized model go, whose packed directory is `out`."""
    return out.with_name(f"{out.name}-adapter")


def read_recipe(name: str) -> Recipe:
    """A recipe of ours by its name, or a YAML file.

    Raises:
        InputError: no such recipe, or a setting that is none or has a value that it cannot have.
    """
    known = RECIPES / f"{name}.yaml"
    path = known if known.is_file() and "/" not in name else Path(name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InputError("--recipe", f"{names}, or a YAML file", f"{name}") from None
    except OSError as error:
        raise RunError(f"{name}: cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise InputError(f"{name}", f"at most {_LARGEST} bytes", f"{len(data)}")
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name}", f"YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(values, name)


def parse_recipe(values: Any, where: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises InputError, naming `where`."""
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise InputError(f"{where}", "settings with a list of stages")
    stages = []
    for number, stage in enumerate(values["stages"], 1):
        place = f"{where}: stage {number}"
        if not isinstance(stage, dict):
            raise InputError(place, "settings", shown(stage))
        stages.append(_made(Stage, _renamed(stage), place))
    return _made(Recipe, values | {"stages": tuple(stages)}, where)


def change(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """The recipe with settings as a user wrote them.

    Args:
        texts: NAME=VALUE for the recipe or all its stages, N.NAME=VALUE for stage N.

    Raises:
        InputError: another form, no such setting or stage, or a value that it cannot have.
    """
    whole = recipe.to_dict()
    for text in texts:
        name, equals, value = text.partition("=")
        number, dot, rest = name.partition(".")
        if not equals:
            raise InputError("--set", "NAME=VALUE, such as learning_rate=1e-4", f"{text!r}")
        stages = whole["stages"]
        if dot:
            if not number.isdecimal() or not 1 <= int(number) <= len(stages):
                raise InputError(f"--set {text}", f"a stage from 1 to {len(stages)}", f"{number!r}")
            name, stages = rest, [stages[int(number) - 1]]
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = value
        known = [field.name for field in fields(Stage)]
        if name not in known and (dot or name not in whole):
            names = known if dot else [*(n for n in whole if n != "stages"), *known]
            raise InputError("--set", f"settings among {', '.join(names)}", f"{name!r}")
        if not dot and name in whole and name != "stages":
            whole[name] = read
        else:
            for stage in stages:
                if dot or name not in _ANSWERS_ALONE or stage["objective"] == "answers":
                    stage[name] = read
    return parse_recipe(whole, "--set")


def _made(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise InputError(f"{where}", f"settings among {', '.join(known)}", f"{name!r}")
    if isinstance(values.get("targets"), list):
        values = values | {"targets": tuple(values["targets"])}
    for name in _FRACTIONS:  # YAML 1.1 takes 1e-4, without a point, for text
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
        raise InputError(f"{name}", f"{', '.join(map(str, allowed))}", f"{value!r}")


def _integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{name}", f"a whole number of at least {least}", f"{value!r}")


def _number(name: str, value: object, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name}", f"a number from {least:g} to {most:g}", f"{value!r}")
