"""What training with rounding in the loop wins back, on the embedded model: the table of docs/finetune.md.

    python benchmarks/qat.py --data pairs.tsv --task translation --work DIR --seeds 0,1,2

The embedded model is first tuned in float on the task (once). From there, with every seed: the same number of
further steps on the same data in float, with the rounding in every step (qat), and in two stages (qat-lora).
What rounding costs is the loss of the float result rounded to nearest less that of the float result itself;
`won back` is the share of it that a trained model does not lose. All models run in the engine, on examples
that none has learned. Intervals are of the bootstrap over examples, paired, and over seeds.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from llamita.checkpoint import Checkpoint, resolve
from llamita.engine.llm import load
from llamita.methods.setup import Setup
from llamita.quantize import quantize
from llamita.scheme import make_scheme
from llamita.train.data import Data, load_data
from llamita.train.finetune import Job, quiet, train
from llamita.train.measures import example_losses
from llamita.train.recipe import Recipe, adaptor_place, change, read_recipe
from llamita.train.save import save_adaptors, save_float, save_packed

DRAWS = 2000
Losses = dict[str, list[np.ndarray]]  # of every example, by model


def settings(arguments: argparse.Namespace, steps: int, rate: float) -> list[str]:
    """Of every stage."""
    return [f"steps={steps}", f"learning_rate={rate}", f"length={arguments.length}", "batch=4",
            "micro_batch=4", f"held_out={arguments.held_out}"]  # fmt: skip


def tune_first(arguments: argparse.Namespace, place: Path) -> Path:
    """The embedded model tuned in float: where all others begin."""
    if place.exists():
        return place
    source = Checkpoint(resolve("embedded"))
    recipe = change(read_recipe("sft"), settings(arguments, arguments.first_steps, 1e-3))
    data = load_data(arguments.data, arguments.task, source, recipe, 0)
    work = fresh(arguments.work / "first-work")
    trained = train(Job(source, recipe, data.rows, data.held_out, work))
    partial = fresh(place.with_suffix(".partial"))
    with quiet():
        save_float(trained.model, source, partial)
    return partial.rename(place)


def fresh(path: Path) -> Path:
    """An empty directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def run_seed(arguments: argparse.Namespace, base: Path, seed: int) -> Losses:
    """Losses of all models of a seed."""
    source = Checkpoint(base)
    group = f"group_size={arguments.group_size}"
    plain = settings(arguments, arguments.steps, arguments.rate)
    recipes = {
        "float": change(read_recipe("sft"), plain),
        "qat": change(read_recipe("qat"), [*plain, group, f"distill={arguments.distill}"]),
        "qat-lora": change(
            read_recipe("llama3.2-qat-lora").without_preferences(),
            [*plain, group, f"distill={arguments.distill}",
             f"1.steps={arguments.steps - arguments.lora_steps}",
             f"2.steps={arguments.lora_steps}", f"2.learning_rate={arguments.lora_rate}"],
        ),
    }  # fmt: skip
    data = load_data(arguments.data, arguments.task, source, recipes["float"], 0)  # held out: the same always
    found: Losses = {}
    for name, recipe in recipes.items():
        place = arguments.work / f"{name}-{seed}"
        if not place.exists():
            make(source, data, recipe, seed, place)
        found[name] = losses_of(data, place)
    tuned = Checkpoint(arguments.work / f"float-{seed}")
    scheme = make_scheme("llama3.2", arguments.group_size)
    for method in ("rtn", "equalize+qronos+tune"):
        place = arguments.work / f"{method}-{seed}"
        if not place.exists():
            setup = Setup(data.calibration("data", 128), seed, settings={"tune.rate": 0})
            quantize(tuned, str(tuned.path), place, scheme, method, setup if "+" in method else None)
        found[method] = losses_of(data, place)
    return found


def make(source: Checkpoint, data: Data, recipe: Recipe, seed: int, place: Path) -> None:
    """Train and save a model."""
    work = fresh(place.with_name(f"{place.name}-work"))
    trained = train(Job(source, recipe, data.rows, data.held_out, work, seed=seed))
    with quiet():
        if not recipe.is_quantized:
            partial = fresh(place.with_name(f"{place.name}-partial"))
            save_float(trained.model, source, partial)
            partial.rename(place)
            return
        model = trained.model
        if recipe.has_adaptors:
            save_adaptors(model, fresh(adaptor_place(place)))
            model = model.unload()
        scheme = make_scheme(recipe.preset, recipe.group_size)
        save_packed(model, source, str(source.path), place, scheme, work, {}, overwrite=False)


def losses_of(data: Data, place: Path) -> list[np.ndarray]:
    """Of every held-out example, in the engine."""
    beside = adaptor_place(place)
    llm = load(place, adaptors={"a": beside} if beside.exists() else {})
    return example_losses(llm, [one for one, _ in data.measured], "a" if beside.exists() else None)


def interval(seeds: list[Losses], name: str) -> tuple[float, float, float]:
    """Won back, and its 95 % interval: examples and seeds are drawn again."""
    random = np.random.default_rng(0)
    sums = [
        {model: np.array([one.sum() for one in losses]) for model, losses in found.items()} for found in seeds
    ]

    def share(drawn: list[dict[str, np.ndarray]], picked: np.ndarray) -> float:
        total = {model: sum(float(found[model][picked].sum()) for found in drawn) for model in sums[0]}
        return (total["rtn"] - total[name]) / (total["rtn"] - total["float"])

    count = len(sums[0]["float"])
    draws = [
        share(
            [sums[i] for i in random.integers(len(sums), size=len(sums))], random.integers(count, size=count)
        )
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return share(sums, np.arange(count)), float(low), float(high)


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--task")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--group-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--first-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--distill", type=float, default=0.5)
    parser.add_argument("--lora-steps", type=int, default=30)
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = tune_first(arguments, arguments.work / "first")
    seeds = [run_seed(arguments, base, seed) for seed in arguments.seeds]
    print("| model | loss, nats a learned token | won back |\n|---|---|---|")
    for name in seeds[0]:
        means = [float(np.concatenate(found[name]).mean()) for found in seeds]
        shown = f"{np.mean(means):.4f} ({', '.join(f'{mean:.4f}' for mean in means)})"
        won, low, high = interval(seeds, name)
        print(f"| {name} | {shown} | {won:.0%} ({low:.0%} to {high:.0%}) |")


if __name__ == "__main__":
    main()
