"""Measure what training with rounding in the loop wins back: the table of docs/guide/finetune.md.

    python benchmarks/qat.py --data pairs.tsv --task translation --work DIR --seeds 0,1,2

With every seed the embedded model is trained in float and with rounding in every step, by the same stages, steps and
learning rates on the same data: all weights (float, qat), then also adapters of rank 16 (float-lora, merged in the
end; qat-lora). The cost of rounding is the loss of the float result rounded to nearest, less that of the float result.
`won back` is the share of it that a model does not lose. All models run in the engine, on examples that none has
learned. Intervals are of the paired bootstrap over examples and seeds.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llamita.imports.open import resolve
from llamita.loading import load
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.train.data import Data, load_data
from llamita.train.finetune import quiet, train
from llamita.train.job import FinetuneJob
from llamita.train.measures import example_losses
from llamita.train.recipe import Recipe, adapter_place, parse_recipe
from llamita.train.save import save_adapters, save_float, save_packed

DRAWS = 2000
Losses = dict[str, list[np.ndarray]]  # of every example, by model
PAIRS = {"float": "qat", "float-lora": "qat-lora"}  # each pair is trained alike
CHAINS: dict[str, tuple[str, dict[str, Any]]] = {  # to nearest, and the best of docs/results/quality.md at equal size
    "rtn": ("rtn", {}),
    "preset llamita": ("equalize+spinquant+qronos+tune", {"spinquant.rotations": "R4", "tune.rate": 0}),
}


def fresh(path: Path) -> Path:
    """Make an empty directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def run_seed(arguments: argparse.Namespace, seed: int) -> Losses:
    """Return the losses of all models of a seed."""
    source = Checkpoint(resolve("embedded"))
    recipes = recipes_of(arguments)
    data = load_data(arguments.data, arguments.task, source, recipes["float"], 0)  # the same are held out for all seeds
    found: Losses = {}
    for base, rounded in PAIRS.items():
        ends = {base: f"-{seed}", rounded: f"-{arguments.start}-{seed}"}
        places = {name: arguments.work / f"{name}{end}" for name, end in ends.items()}
        for name, place in places.items():
            if not place.exists():
                begun = arguments.work / f"{name.removesuffix('-lora')}{ends[name]}"
                make(source, data, recipes[name], seed, place, begun)
        for name, (method, chosen) in CHAINS.items():
            places[f"{base}, {name}"] = place = arguments.work / f"{base}-{name.replace(' ', '-')}-{seed}"
            if not place.exists():
                setup = Setup(data.calibration("data", 128), seed, settings=chosen) if chosen else None
                scheme = make_scheme("llama3.2", arguments.group_size)
                quantize(Checkpoint(places[base]), base, place, scheme, method, setup)
        found |= {name: losses_of(data, place) for name, place in places.items()}
    return found


def recipes_of(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """Return the recipes; none has a teacher, because the base knows nothing of the task."""
    weights = {"steps": arguments.steps, "learning_rate": arguments.rate}
    adapters = {"train": "adapters", "steps": arguments.lora_steps, "learning_rate": arguments.lora_rate}
    stages = {"float": [weights], "float-lora": [weights, adapters]}
    shape = {"length": arguments.length, "held_out": arguments.held_out, "group_size": arguments.group_size}
    batch = {"batch": 4, "micro_batch": 4}
    starts = {False: "rtn", True: arguments.start}
    return {
        name: parse_recipe(
            {**shape, "start": starts[rounded], "stages": [{**batch, **stage, "quantized": rounded} for stage in given]}
        )
        for base, given in stages.items()
        for name, rounded in ((base, False), (PAIRS[base], True))
    }


def make(source: Checkpoint, data: Data, recipe: Recipe, seed: int, place: Path, begun: Path) -> None:
    """Train and save a model; take the first stage from the model at `begun`, if that exists."""
    work = fresh(place.with_name(f"{place.name}-work"))
    if begun.exists():
        for kept in begun.with_name(f"{begun.name}-work").glob("stage-1.*"):
            shutil.copy(kept, work)
    trained = train(FinetuneJob(source, recipe, data, place, data_name="data", seed=seed), work)
    with quiet():
        if not recipe.is_quantized:
            partial = fresh(place.with_name(f"{place.name}-partial"))
            model = trained.model.merge_and_unload() if recipe.has_adapters else trained.model
            save_float(model, source, partial)
            partial.rename(place)
            return
        model = trained.model
        if recipe.has_adapters:
            save_adapters(model, "embedded", fresh(adapter_place(place)))
            model = model.unload()
        scheme = make_scheme(recipe.preset, recipe.group_size)
        save_packed(model, source, str(source.path), place, scheme, work, {}, overwrite=False)


def losses_of(data: Data, place: Path) -> list[np.ndarray]:
    """Return the losses of every held-out example, computed in the engine."""
    adapters = adapter_place(place)
    llm = load(place, adapters={"a": adapters} if adapters.exists() else {})
    return example_losses(llm, [one for one, _ in data.measured], "a" if adapters.exists() else None)


def interval(seeds: list[Losses], base: str, name: str) -> tuple[float, float, float]:
    """Return the share of the cost of rounding `base` that a model wins back, with its 95 % interval."""
    random = np.random.default_rng(0)
    sums = [{model: np.array([one.sum() for one in losses]) for model, losses in found.items()} for found in seeds]

    def share(drawn: list[dict[str, np.ndarray]], picked: np.ndarray) -> float:
        total = {model: sum(float(found[model][picked].sum()) for found in drawn) for model in sums[0]}
        rounded = total[f"{base}, rtn"]
        return (rounded - total[name]) / (rounded - total[base])

    count = len(sums[0]["float"])
    draws = [
        share([sums[i] for i in random.integers(len(sums), size=len(sums))], random.integers(count, size=count))
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return share(sums, np.arange(count)), float(low), float(high)


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--lora-steps", type=int, default=100)
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--start", default="rtn", help="what rounding begins with")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    seeds = [run_seed(arguments, seed) for seed in arguments.seeds]
    print("| model | loss, nats a learned token | won back |\n|---|---|---|")
    for base, rounded in PAIRS.items():
        for name in (base, *(f"{base}, {chain}" for chain in CHAINS), rounded):
            means = [float(np.concatenate(found[name]).mean()) for found in seeds]
            shown = f"{np.mean(means):.4f} ({', '.join(f'{mean:.4f}' for mean in means)})"
            won, low, high = interval(seeds, base, name)
            print(f"| {name} | {shown} | {won:.0%} ({low:.0%} to {high:.0%}) |")


if __name__ == "__main__":
    main()
