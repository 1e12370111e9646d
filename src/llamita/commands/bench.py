"""`llamita bench`: measure a model's speed, size and memory against the machine's limits and a baseline."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer

from llamita.bench import run as bench_run
from llamita.bench.plan import describe, describe_shape
from llamita.bench.report import Settings, machine_line
from llamita.bench.run import Job, run_bench
from llamita.bench.shapes import find_shape
from llamita.bench.speed import NEW_TOKENS, PROMPT_TOKENS
from llamita.bench.worker import ModelSpec
from llamita.commands import console
from llamita.commands.options import (
    Context,
    FitGroups,
    FloatMath,
    GroupSize,
    Json,
    KvCache,
    Revision,
    Shape,
    Threads,
    model_argument,
)
from llamita.commands.sources import convert_first
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError, RunError
from llamita.imports.open import resolve
from llamita.models.layer_kinds import fit_groups
from llamita.models.packed import METADATA
from llamita.numerics.scheme import FLOAT, PRESETS, choose_scheme
from llamita.system.extras import load_optional
from llamita.system.files import exists_in
from llamita.system.threads import remark
from llamita.text.printable import megabytes

DEFAULT_SCHEME = "llama3.2"
BF16 = "bf16"  # the baseline that needs no checkpoint
PLOT = "llamita.bench.roofline"  # imported on use: it needs matplotlib
_LABELS = {
    "prefill": "prefill",
    "prefill_with_attention": "prefill, attention counted",
    "decode": "decode",
    "batch": "decode, {batch} sequences",
}

_Src = Annotated[str | None, model_argument("[SRC]")]
_Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        "--preset",
        help=f"Round a float model to this scheme: {', '.join(PRESETS)}, or none; {DEFAULT_SCHEME} by default.",
    ),
]
_Baseline = Annotated[
    str | None, typer.Option(metavar="SRC|bf16", help="Compare with this; bf16: random weights of the same shape.")
]
_PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
_NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to decode after the prompt.")]
_Batch = Annotated[int, typer.Option(min=1, max=64, help="Also decode so many sequences together.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Runs; the figures are their medians.")]
_Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Draw a roofline (speeds under the machine's limits), and bars that compare with the baseline.",
    ),
]


def command(
    src: _Src = None,
    revision: Revision = None,
    shape: Shape = None,
    scheme: _Scheme = None,
    group_size: GroupSize = None,
    fit_groups: FitGroups = False,
    baseline: _Baseline = None,
    prompt_tokens: _PromptTokens = PROMPT_TOKENS,
    new_tokens: _NewTokens = NEW_TOKENS,
    batch: _Batch = 1,
    repeats: _Repeats = 5,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    float_math: FloatMath = FLOAT_MATHS[0],
    json: Json = False,
    plot: _Plot = None,
) -> None:
    """Measure speed, size and memory of a model, and the machine's limits in the same run.

    Give a model or --shape, which needs no files.

    Example: llamita bench --shape 1b --baseline bf16
    """
    convert_first(src, None if baseline and baseline.lower() == BF16 else baseline, quiet=json)
    model = _model(src, shape, scheme, group_size, fit_groups)
    draw = _plotter(plot) if plot else None
    settings = Settings(prompt_tokens, new_tokens, batch)
    base, probe = _baseline(baseline, model), bench_run.PROBE_BYTES
    job = Job(model, base, settings, repeats, threads, context, kv_cache, probe, float_math)
    with console.progress(quiet=json) as progress:
        result = run_bench(job, progress)
    console.note(remark(result["machine"]["threads"]))
    if json:
        console.print_json(result)
    else:
        _print(result)
    if draw:  # last, so that its failure loses no figure
        draw(result, plot)
    if weak := result["limits"]["too_weak"]:
        raise RunError(f"{'; '.join(weak)}; try more --repeats on a quiet machine")


def _model(
    src: str | None, shape: str | None, scheme: str | None, group_size: int | None, fits: bool
) -> ModelSpec:  # fmt: skip
    if (src is None) == (shape is None):
        found, hint = ("both", "try one of them") if src else ("neither", "try --shape 1b")
        raise InputError("bench", "a model or --shape", found, hint)
    if shape is not None:
        shape, _ = find_shape(shape)
    elif exists_in(resolve(str(src)), METADATA):
        if scheme not in (None, FLOAT) or group_size or fits:
            raise InputError("--scheme, --group-size, --fit-groups", "a float model", f"{src}, which is quantized")
        return ModelSpec(src, None)
    try:
        chosen = choose_scheme(scheme or DEFAULT_SCHEME, group_size)
    except InputError as error:
        raise error.at(error.where.replace("--preset", "--scheme")) from None
    if fits:
        if chosen is None:
            raise InputError("--fit-groups", "a scheme that rounds", FLOAT)
        described = describe(str(src)) if shape is None else describe_shape(shape)[1]
        chosen = fit_groups(described.config, chosen)
    return ModelSpec(src, shape, chosen)


def _baseline(name: str | None, model: ModelSpec) -> ModelSpec | None:
    if name is None:
        return None
    if name.lower() == BF16:
        return ModelSpec(model.source, model.shape, random=model.source is not None)
    resolve(name)
    return ModelSpec(name, None)


def _plotter(path: Path) -> Any:
    """Return the function that draws, after finding all that can be wrong with the file: measuring takes long."""
    if path.suffix.lower() != ".png":
        raise InputError("--plot", "a name that ends in .png", f"{path}")
    directory = path.absolute().parent
    if not directory.is_dir():
        raise InputError("--plot", "an existing directory", f"{directory}")
    if path.is_dir():
        raise InputError("--plot", "a file", f"the directory {path}")
    try:
        TemporaryFile(dir=directory).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError("--plot", "a directory that can be written", f"{directory}: {reason}") from None
    lacking = (
        "--plot: expected the package {package}, found none; try pip install 'llamita[plot]' (in a checkout '.[plot]')"
    )
    return load_optional(f"{PLOT}:draw", lacking)


def _print(result: dict[str, Any]) -> None:
    model, baseline, limits = result["model"], result["baseline"], result["limits"]
    columns = ["", model["name"], *([baseline["name"], "ratio"] if baseline else [])]
    console.print_table(_title(result), columns, _rows(result))
    columns = ["", "work", "rate", "limit", "of it", "at the time"]
    title = "Compared with the limits measured in the same run (GMAC: 10^9 int8 multiply-adds)"
    console.print_table(title, columns, _fraction_rows(result))
    for key in ("model", "baseline"):
        if result[key]:
            console.print_line(_memory_line(result[key]))
    if model["of_limit"]["decode"]["limit"] is None:
        cache = megabytes(limits["cache_bytes"])
        console.print_line(f"no memory limit for decode: the {cache} cache may hold much of the model")
    if limits["vnni_rate"]:
        rates = [f"{limits[name] / 1e9:,.1f}" for name in ("int8_rate", "vnni_rate")]
        console.print_line("int8 limits in registers: AMX {} GMAC/s, AVX-512 VNNI {} GMAC/s".format(*rates))
    versions = "Python {python}, NumPy {numpy}, {os}".format(**result["machine"])
    console.print_line(machine_line(result, versions))


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    weights = ", random weights" if result["model"]["is_random"] else ""
    return (
        f"A prompt of {settings['prompt_tokens']:,} tokens, {settings['new_tokens']:,} more; "
        f"medians of {settings['repeats']}{weights}"
    )


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of Meta's table of its quantized models, then those that it lacks."""
    batch = result["settings"]["batch"]
    rows = [
        ("decode tok/s", "decode_tokens_per_second", _rate),
        ("time to first token", "first_token_seconds", _seconds),
        ("prefill tok/s", "prefill_tokens_per_second", _rate),
        ("model size", "size_bytes", megabytes),
        ("memory", "memory_bytes", megabytes),
        ("load time", "load_seconds", _seconds),
    ]
    if batch > 1:
        rows.append((f"decode tok/s, {batch} sequences", "batch_tokens_per_second", _rate))
    models = [result["model"], *([result["baseline"]] if result["baseline"] else [])]
    table = []
    for label, key, show in rows:
        cells = ["" if model[key] is None else show(model[key]) for model in models]
        if all(cells) and len(models) == 2:
            cells.append(_ratio(key, models[0][key] / models[1][key]))
        table.append([label, *cells])
    return table


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"


def _ratio(key: str, ratio: float) -> str:
    """Write the ratio of rates as a factor, that of seconds and bytes as what was saved or added."""
    return f"{ratio:.2f}x" if key.endswith("per_second") else f"{100 * (ratio - 1):+.1f}\xa0%"


def _fraction_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for key in ("model", "baseline"):
        for what, row in (result[key] or {"of_limit": {}})["of_limit"].items():
            is_bytes = row["unit"] == "bytes"
            if key == "baseline" and not is_bytes:
                continue  # the limit is that of int8 arithmetic, not of float
            label = f"{result[key]['name']}: {_LABELS[what]}".format(**result["settings"])
            work = megabytes(row["work"]) if is_bytes else f"{row['work'] / 1e9:,.3g} GMAC"
            unit = "GB/s" if is_bytes else "GMAC/s"
            rows.append([label, work, f"{row['rate'] / 1e9:,.1f} {unit}", *_limit_cells(row, unit)])
    return rows


def _limit_cells(row: dict[str, Any], unit: str) -> list[str]:
    """Return the cells for a limit and the fractions of it; empty ones where there is no limit."""
    if row["limit"] is None:
        return ["", "", ""]
    limit, fraction = f"{row['limit'] / 1e9:,.1f} {unit}", row["fraction"]
    return [limit, "too weak", ""] if fraction is None else [limit, f"{fraction:.1%}", f"{row['fraction_nearby']:.1%}"]


def _memory_line(model: dict[str, Any]) -> str:
    rest = model["memory_bytes"] - model["weights_bytes"] - model["cache_bytes"]
    parts = {"weights": model["weights_bytes"], "cache": model["cache_bytes"], "the rest": rest}
    listed = ", ".join(f"{megabytes(size)} {what}" for what, size in parts.items())
    return f"memory of {model['name']}: {listed}"
