"""Merge an adapter into its model: `llamita merge`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import (
    CalibrationText,
    Json,
    Length,
    Out,
    Overwrite,
    Revision,
    Samples,
    Seed,
    Threads,
    model_argument,
)
from llamita.commands.sources import convert_first
from llamita.errors import InputError, shown
from llamita.evaluate.scores import read_text
from llamita.imports.open import open_source
from llamita.methods.chain import Chain, check_chain, parse_chain
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.numerics.intervals import Interval
from llamita.quantize.calibration import SELF, load_calibration
from llamita.system import processes
from llamita.system.machine import MemoryWatch
from llamita.system.progress import Progress
from llamita.system.threads import use_threads
from llamita.text.tokenizer import Tokenizer
from llamita.train.merge import MergedSource, MergeLoss, check_targets, measure, merge_float, merge_packed, written_text

_Base = Annotated[str, model_argument("BASE", "The model that the adapter was trained on, float or 4-bit")]
_Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="The adapter's directory, in the format of Hugging Face's PEFT.")
]
_Method = Annotated[str, typer.Option(help="How to round a 4-bit BASE again: rtn, gptq, qronos, tune, as in quantize.")]
_Text = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A text to measure the loss on; by default one that the model writes."),
]


def command(
    base: _Base,
    adapter: _Adapter,
    out: Out = None,
    revision: Revision = None,
    method: _Method = "rtn",
    calibration: CalibrationText = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    text: _Text = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its model's weights: in float, or in 4 bits by the base's scheme.

    Rounding the merged weights can lose part of the adapter's effect (with rtn, even all).
    The loss is measured and printed.

    Example: llamita merge meta-llama/Llama-3.2-1B-Instruct my-adapter -o tuned
    """
    if processes.world() > 1:
        raise InputError("merge", "a single process", str(processes.world()), "try without torchrun")
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME")
    use_threads(threads)
    chain = _chain(method)
    content = read_text(text) if text else None
    convert_first(base, quiet=json)
    opened = open_source(base)
    assert isinstance(opened, Checkpoint | PackedModel)
    source = MergedSource(opened, adapter)
    _check(source, chain, out, overwrite, calibration)
    began, watch = time.perf_counter(), MemoryWatch()
    with watch, console.progress(quiet=json) as progress:
        if source.base_scheme is not None and content is None:
            content = written_text(source, progress)
        if content is not None:
            _check_text(source, content)
        _merge(source, base, out, chain, (calibration, samples, length, seed), overwrite, progress)
        loss = None if content is None else measure(source, out, content, progress)
    values = {"out": str(out), "scheme": source.base_scheme and source.base_scheme.to_dict(),
              "method": source.base_scheme and str(chain), "seconds": time.perf_counter() - began,
              "memory_bytes": watch.peak}  # fmt: skip
    source.close()
    if json:
        return console.print_json(values | {"loss": loss and asdict(loss)})
    _print(values, loss, str(text) if text else None, base, adapter)


def _chain(method: str) -> Chain:
    chain = parse_chain(method)
    if chain.transforms or chain.rounding == "trained":
        expected = "a method that rounds, such as rtn or qronos"
        raise InputError("--method", expected, shown(method), "the base's transforms are kept")
    return chain


def _check(source: MergedSource, chain: Chain, out: Path, overwrite: bool, calibration: str | None) -> None:
    """Raise InputError for all that can be checked before any work."""
    check_targets(source, out, overwrite)
    measures = chain.needs_calibration({})
    if source.base_scheme is None and measures:
        raise InputError("--method", "a 4-bit BASE", "a float one", f"try llamita quantize on {out}")
    if calibration is not None and not measures:
        raise InputError("--calibration", "a method that looks at activations", f"{chain}", "try gptq")
    check_chain(chain, {}, source.config)


def _check_text(source: MergedSource, text: str) -> None:
    tokens = len(Tokenizer(source.path, source.config).encode(text))
    if tokens < 2:
        raise InputError("--text", "at least 2 tokens to measure on", f"{tokens}", "try a longer text")


def _merge(
    source: MergedSource, base: str, out: Path, chain: Chain, text: tuple[str | None, int, int, int],
    overwrite: bool, progress: Progress,
) -> None:  # fmt: skip
    """Write OUT; `text` is the calibration text of a method, its samples, length and seed."""
    if source.base_scheme is None:
        return merge_float(source, base, out, overwrite, progress)
    name, samples, length, seed = text
    setup = Setup(seed=seed)
    if chain.needs_calibration({}):  # the merged model itself, in float, writes the text by default
        setup = Setup(load_calibration(name or SELF, source, samples, length, seed, progress), seed)
    merge_packed(source, base, out, str(chain), setup, overwrite, progress)
    return None


def _print(values: dict[str, Any], loss: MergeLoss | None, text: str | None, base: str, adapter: Path) -> None:
    out, is_packed = values["out"], values["scheme"] is not None
    console.print_line(f"{out}: {'a 4-bit model' if is_packed else 'a float checkpoint'}")
    if loss is not None:
        where = f"{loss.tokens:,} tokens of {text or 'its own text'}"
        warning = "warning: the merged weights were rounded again: " if is_packed else ""
        console.note(
            f"{warning}KL divergence {_interval(loss.kl)} nats a token from {base} with {adapter}; "
            f"{base} alone has {loss.alone.value:.4f} ({where})"
        )
        alone, unmerged, merged = loss.losses
        if text is not None:
            console.note(f"loss: {alone:.4f} {base}, {unmerged:.4f} with {adapter}, {merged:.4f} merged")
    if is_packed and values["method"] == "rtn":
        console.note("closer: --method qronos, which calibrates (needs llamita[torch]); without any loss: "
                     f"llamita generate {base} --prompt TEXT --adapter {adapter}")  # fmt: skip
    console.note(f"{values['seconds']:,.0f} s, {values['memory_bytes'] / 1e6:,.0f} MB")
    command = "generate {} --prompt TEXT" if is_packed else "quantize {0} -o {0}-4bit"
    console.note(f"try: llamita {command.format(out)}")


def _interval(interval: Interval) -> str:
    return f"{interval.value:.4f} ({interval.low:.4f} to {interval.high:.4f})"
