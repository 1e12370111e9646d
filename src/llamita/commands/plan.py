"""`llamita plan`: estimate size, memory and speed before anything is downloaded or made."""

from dataclasses import asdict, replace
from typing import Annotated

import typer

from llamita.bench.plan import Estimate, Machine, describe_shape, estimate_all, fitting, measure_machine
from llamita.commands import console
from llamita.commands.options import FitGroups, GroupSize, Json, KvCache, Revision, Shape, Threads, model_argument
from llamita.commands.sources import describe_source
from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import describe_kinds, fit_groups
from llamita.numerics.scheme import PRESETS, QuantScheme, make_scheme
from llamita.system.threads import remark, use_threads
from llamita.text.printable import megabytes

_Src = Annotated[str | None, model_argument("[SRC]", "A config.json, a model, or 'embedded'")]
_Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", help=f"Plan for this preset: {', '.join(PRESETS)}; repeatable; all by default."),
]


def command(
    src: _Src = None,
    revision: Revision = None,
    shape: Shape = None,
    preset: _Presets = None,
    group_size: GroupSize = None,
    fit_groups: FitGroups = False,
    threads: Threads = None,
    kv_cache: KvCache = None,
    json: Json = False,
) -> None:
    """Estimate size, memory and speed on this machine; download nothing but a config.json or a header.

    Sizes are exact. Memory and speed are estimates from this machine's measured limits; they are rough for
    models of a few million weights. Give a model or --shape.

    Example: llamita plan meta-llama/Llama-3.2-1B --preset llama3.2
    """
    if (src is None) == (shape is None):
        raise InputError("plan", "a model or --shape", "both" if src else "neither", "try --shape 1b")
    use_threads(threads)
    schemes = [_named(name, group_size) for name in preset or PRESETS]
    name, model = describe_shape(str(shape)) if src is None else (src, describe_source(src, quiet=json))
    if fit_groups:
        schemes = [_fitted(model.config, scheme) for scheme in schemes]
    notes: list[str] = []
    if not preset and group_size is None and model.scheme is None:  # what the user names is refused if it does not fit
        schemes, notes = fitting(model, schemes)
    notes += [f"{s.name}: {describe_kinds(model.config, s)}" for s in schemes if s.layers and model.scheme is None]
    console.note(remark())
    with console.progress(quiet=json) as progress:
        if progress:
            progress("measuring this machine", 0, 1)
        machine = measure_machine()
    estimates = estimate_all(model, machine, schemes, kv_cache)
    if json:
        console.print_json({"source": name, "context": model.config.context, "machine": asdict(machine),
                            "estimates": [asdict(e) for e in estimates], "notes": notes})  # fmt: skip
        return
    _print(name, estimates, machine)
    for note in notes:
        console.note(note)


def _named(preset: str, group_size: int | None) -> QuantScheme:
    """Return the scheme of a preset, under a name that tells it from the others."""
    scheme = make_scheme(preset, group_size)
    return scheme if scheme.name == preset else replace(scheme, name=f"{preset}, groups of {group_size}")


def _fitted(config: ModelConfig, scheme: QuantScheme) -> QuantScheme:
    fitted = fit_groups(config, scheme)
    return fitted if fitted == scheme else replace(fitted, name=f"{scheme.name}, fitted")


def _print(name: str, estimates: list[Estimate], machine: Machine) -> None:
    contexts = list(estimates[0].memory)
    columns = ["", "size", *(f"memory, {_tokens(c)}" for c in contexts), "decode tok/s", "prefill tok/s", "fits"]
    console.print_table(f"{name}: estimates for this machine", columns, [_row(e) for e in estimates])
    console.note(_machine_line(machine))
    if min(e.tensor_bytes for e in estimates) <= machine.cache:
        console.note("this model fits the CPU's caches, so its speeds are rough; `llamita bench` measures them")


def _row(estimate: Estimate) -> list[str]:
    prefill = "" if estimate.prefill is None else f"~{estimate.prefill:,.0f}"
    memory = [megabytes(size) for size in estimate.memory.values()]
    size, fits = megabytes(estimate.tensor_bytes), "yes" if estimate.fits else "no"
    return [estimate.name, size, *memory, f"~{estimate.decode:,.1f}", prefill, fits]


def _tokens(count: int) -> str:
    return f"{count // 1024}K tokens" if count % 1024 == 0 else f"{count} tokens"


def _machine_line(machine: Machine) -> str:
    rates = f"{machine.bandwidth / 1e9:,.1f} GB/s read, {machine.int8_rate / 1e9:,.0f} G int8 multiply-adds/s"
    free = megabytes(machine.memory_free)
    return f"measured: {rates} on {machine.threads} threads; {free} of memory free"
