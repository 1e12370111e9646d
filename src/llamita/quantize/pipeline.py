"""Make a packed model of a float one: check, calibrate, choose, round, write, judge.

`run` does all of it for a `QuantizeJob`, as `llamita quantize` does. `quantize` is the part that rounds an opened
source and writes it. `RoundedSource` gives the same numbers without a directory.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.errors import InputError
from llamita.imports.open import open_float, resolve
from llamita.methods import chain as chains
from llamita.methods.chain import Chain, check_chain, choose_chain, parse_chain
from llamita.methods.setup import Setup
from llamita.models import layer_kinds
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.metadata import METADATA, ErrorRecord, Metadata, SourceRecord
from llamita.models.packed_writer import SHARD_BYTES, copy_companions, find_companions, stored_rotations, write_config
from llamita.models.sizes import Plan, make_plan
from llamita.models.weights import FloatSource, places_of, transform_dtype
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.calibration import CalibrationSpec, calibrated, text_of
from llamita.quantize.choose import check_goal, choose, judge
from llamita.quantize.cost import estimate, plan_chain
from llamita.quantize.layer_choice import Goal, Selection
from llamita.quantize.records import card, source_names, source_record
from llamita.quantize.write import ModuleError, write_weights
from llamita.system import processes
from llamita.system.files import FileTable, exists_in, write_bytes
from llamita.system.kept_work import discard_kept_work, has_kept_work, kept_work
from llamita.system.machine import MemoryWatch
from llamita.system.progress import Note, Progress
from llamita.system.staging import check_space, check_target, staged
from llamita.text.printable import megabytes

SMALL_FILES = 64 * 2**20  # bytes allowed for tokenizer, licence and the like when space is checked
_WORST = 5  # modules named in summary and card


@dataclass(frozen=True)
class QuantizeJob:
    """A packed model to make.

    Attributes:
        source: a model directory, a .gguf, a hub name, or "embedded".
        out: the directory to make.
        preset: a scheme and the method that makes it: a key of `scheme.PRESETS`.
        scheme: replaces the preset's, such as `make_scheme("llama3.2", 64)`.
        method: a chain such as "equalize+gptq" that replaces the preset's method and its settings.
        settings: of single methods, by names such as "tune.steps".
        runtime_rotation: whether the model may rotate activations at run time.
        calibration: the text, and the seed of all draws.
        keep_float: patterns of layers that stay float, such as "*.down_proj".
        goal: choose how each layer is stored, for a size or a loss.
        overwrite: replace an `out` that llamita made.
        fit_groups: give each layer whose inputs the group size does not divide the next smaller size that does.

    Raises:
        InputError: an unknown preset, method or setting, or `fit_groups` with a goal.
    """

    source: str | Path
    out: Path
    preset: str = "llama3.2"
    scheme: QuantScheme | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    runtime_rotation: bool = True
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    keep_float: tuple[str, ...] = ()
    goal: Goal | None = None
    overwrite: bool = False
    fit_groups: bool = False

    def __post_init__(self) -> None:
        make_scheme(self.preset)
        if self.fit_groups and self.goal is not None:
            expected = "neither --max-size nor --max-loss, which choose among the sizes that fit each layer"
            raise InputError("--fit-groups", expected)
        assert self.chain.names

    @cached_property
    def _methods(self) -> tuple[Chain, dict[str, Any]]:
        return choose_chain(self.preset, self.method, dict(self.settings), self.runtime_rotation)

    @property
    def chain(self) -> Chain:
        """The methods, those of the preset unless `method` replaces them."""
        return self._methods[0]

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings of the run, those of the preset included."""
        return self._methods[1]

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        return self.goal is not None or self.chain.needs_calibration(self.all_settings)

    def scheme_for(self, config: ModelConfig) -> QuantScheme:
        """Return the scheme for this model, with the layers that stay float or take a smaller group size.

        Raises:
            InputError: a pattern that fits no layer.
        """
        scheme = layer_kinds.keep_float(config, self.scheme or make_scheme(self.preset), self.keep_float)
        return layer_kinds.fit_groups(config, scheme) if self.fit_groups else scheme


@dataclass(frozen=True)
class Summary:
    """What was made.

    Attributes:
        config: of the source.
        scheme: with the layers that are stored in another way than most.
        memory: bytes at the peak, without pages of files; 0 where it was not watched.
        errors: of each module, as Σ(w - ŵ)² / Σw².
        selection: how layers were chosen, if they were.
    """

    out: Path
    config: ModelConfig
    scheme: QuantScheme
    plan: Plan
    seconds: float
    memory: int
    mean_squared_error: float
    relative_error: float
    errors: dict[str, float]
    selection: Selection | None = None

    def worst(self, count: int = _WORST) -> list[tuple[str, float]]:
        """Return the modules with the largest relative error, worst first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


def run(job: QuantizeJob, progress: Progress = None, note: Note = None) -> Summary | None:
    """Make the packed model of a job.

    Args:
        progress: called with what is being done, how many are done, and of how many.
        note: called with single lines for the user, such as the time to expect.

    Returns:
        The summary. None in all processes but the first under torchrun, which only do their part of the rounding.

    Raises:
        InputError: an input or a setting is at fault.
        RunError: a package of the Torch side, space on the disk or the network is missing.
    """
    try:
        return _run(job, progress, note)
    except KeyboardInterrupt:
        if note and job.needs_text and processes.world() == 1:
            is_kept = has_kept_work(job.out) or has_kept_work(text_of(job.out))
            note("stopped; the same command resumes here" if is_kept else "stopped before anything was kept")
        raise


def _run(job: QuantizeJob, progress: Progress, note: Note) -> Summary | None:
    source = _open(job, progress, note)
    chain, scheme = job.chain, _check(job, source)
    with calibrated(job.calibration, source, job.out, progress) if job.needs_text else nullcontext() as text:
        setup, selection = Setup(text, job.calibration.seed, settings=job.all_settings), None
        if job.goal is not None:
            scheme, setup, selection = choose(source, scheme, job.goal, chain, setup, progress)
        if processes.rank() > 0:
            return take_part(source, scheme, str(chain), setup)
        _announce(job, source, scheme, setup, note)
        summary = quantize(source, str(job.source), job.out, scheme, str(chain), setup, job.overwrite,
                           progress=progress)  # fmt: skip
    if selection is not None:
        summary = replace(summary, selection=judge(selection, source, job.out, chain, text))
    source.close()
    discard_kept_work(job.out, "scheme")  # an unfinished run with other settings may have left these
    discard_kept_work(text_of(job.out), "text")
    return summary


def _open(job: QuantizeJob, progress: Progress, note: Note) -> Checkpoint:
    """Return the float model, once OUT is known to be possible."""
    path = resolve(job.source, progress, note)
    if exists_in(path, METADATA):
        raise InputError(f"{job.source}", "a float model", "one that llamita has quantized", "try its source")
    if processes.rank() == 0:
        check_target(job.out, job.overwrite, path)
    return open_float(path)


def _check(job: QuantizeJob, source: Checkpoint) -> QuantScheme:
    """Return the scheme for the source, after all checks that are possible before a text is written."""
    check_chain(job.chain, job.all_settings, source.config)
    if job.calibration.name is not None and not job.needs_text:
        raise InputError("--calibration", "a method that looks at activations", f"{job.chain}", "try gptq")
    scheme = job.scheme_for(source.config)
    if job.goal is not None:
        check_goal(source, scheme, job.goal, job.chain, job.all_settings)
    return scheme


def _announce(job: QuantizeJob, source: Checkpoint, scheme: QuantScheme, setup: Setup, note: Note) -> None:
    """Tell the user what to know of the source, the cost to expect, and when this run resumes an earlier one."""
    if note is not None and (remark := source.remark()) is not None:
        note(remark)
    if note is None or setup.calibration is None or not job.chain.needs_calibration(setup.settings):
        return
    plan = plan_chain(source.config, scheme, lambda name: source.info(name).dtype, job.chain, setup.settings)
    seconds, memory = estimate(plan, scheme, source.config, job.chain, setup, *setup.calibration.tokens.shape)
    note(f"{job.chain}: about {seconds:,.0f} s and {megabytes(memory)} of memory to expect")
    if processes.world() == 1 and has_kept_work(job.out):
        note(f"{job.out}: an earlier run kept what it had finished; it is used if the command is the same")


def quantize(
    source: FloatSource, source_name: str, out: Path, scheme: QuantScheme, method: str = "rtn",
    setup: Setup | None = None, overwrite: bool = False, *, origin: FloatSource | None = None,
    extra: Mapping[str, bytes] | None = None, shard_bytes: int = SHARD_BYTES, progress: Progress = None,
) -> Summary:  # fmt: skip
    """Write `source`, rounded by `scheme`, to the directory `out`, which appears whole or not at all.

    Args:
        source_name: the user's name of the source; it is recorded, a local directory by its whole path.
        origin: the model that `source` was trained from, if it was: it has the name, licence and tokenizer.
        method: a chain such as "rtn" or "spinquant+gptq+tune".
        setup: what methods that look at activations need.
        overwrite: replace an `out` that llamita made.
        extra: files to put next to the weights, by name.

    Raises:
        InputError: `out` exists, a layer does not fit the groups, weights are not finite, no UTF-8 path.
        RunError: disk full, no permission, or a file cannot be read.
    """
    began = time.perf_counter()
    chain, setup, origin = parse_chain(method), replace(setup or Setup(), progress=progress), origin or source
    recorded, shown = source_names(origin, source_name)
    companions = find_companions(origin.path)
    stored = origin.stored_bytes() if isinstance(origin, Checkpoint) else None
    before = make_plan(origin.config, scheme, lambda name: origin.info(name).dtype, source_bytes=stored)  # does it fit?
    for place in places_of(origin):
        check_target(out, overwrite, place)
    record = source_record(origin, recorded, progress)
    watch, kept = MemoryWatch(), _kept_blocks(out, chain, scheme, record, setup)
    with watch, kept as work, staged(out, overwrite, origin.path) as directory:
        setup = replace(setup, work=work)
        changed = chains.transform(source, chain, setup)
        rotations = stored_rotations(changed.rotations)
        plan = make_plan(changed.config, scheme, lambda name: changed.info(name).dtype, shard_bytes,
                         transform_dtype(rotations), before.source_bytes)  # fmt: skip
        check_space(out, plan.file_bytes + SMALL_FILES)
        round_module = chains.rounder(changed, scheme, chain, setup)
        files, errors = write_weights(directory, changed, rotations, scheme, round_module, shard_bytes, progress)
        seconds = time.perf_counter() - began
        summary = _summarize(out, origin.config, scheme, plan, seconds, watch.peak, errors)
        files["config.json"] = write_config(directory, changed.hf_config, scheme, rotations)
        files |= copy_companions(origin.path, directory, companions)
        page = card(origin, shown, scheme, chain, setup, plan, summary.relative_error, summary.worst())
        texts = {"README.md": page, **(extra or {})}
        files |= {file: write_bytes(directory / file, data) for file, data in texts.items()}
        _metadata(chain, setup, rotations, record, summary, files).write(directory)
    return summary


def take_part(source: FloatSource, scheme: QuantScheme, method: str, setup: Setup) -> None:
    """Do this process's part of a method's work and write nothing: for all processes but the first under torchrun."""
    chain = parse_chain(method)
    if chain.needs_calibration(setup.settings):
        chains.rounder(chains.transform(source, chain, setup), scheme, chain, setup)


def _kept_blocks(
    out: Path, chain: Chain, scheme: QuantScheme, source: SourceRecord, setup: Setup
) -> AbstractContextManager[Path | None]:
    """Keep finished blocks in a directory next to `out`, unless rounding is quick or several processes do it."""
    if not chain.needs_calibration(setup.settings) or processes.world() > 1:
        return nullcontext()
    calibration = setup.calibration.record() if setup.calibration else None
    return kept_work(out, {"llamita": __version__, "source": asdict(source), "scheme": scheme.to_dict(),
                           "method": str(chain), "settings": setup.settings, "seed": setup.seed,
                           "calibration": calibration})  # fmt: skip


def _summarize(
    out: Path, config: ModelConfig, scheme: QuantScheme, plan: Plan, seconds: float, memory: int,
    errors: dict[str, ModuleError],
) -> Summary:  # fmt: skip
    total = ModuleError(*(sum(values) for values in zip(*errors.values(), strict=True)))
    relative = {name: error.relative for name, error in errors.items()}
    mean = total.squared / total.weights
    return Summary(out, config, scheme, plan, seconds, memory, mean, total.relative, relative)


def _metadata(
    chain: Chain, setup: Setup, rotations: Rotations, source: SourceRecord, summary: Summary, files: FileTable
) -> Metadata:
    measured = chain.needs_calibration(setup.settings)
    return Metadata(
        llamita=__version__,
        scheme=summary.scheme,
        method=str(chain),
        settings=setup.settings,
        seed=setup.seed if chain.is_random else None,
        rotations=rotations,
        calibration=setup.calibration.record() if measured and setup.calibration else None,
        source=source,
        float_layers=summary.plan.float_layers,
        error=ErrorRecord(summary.relative_error, summary.mean_squared_error, summary.errors),
        files=dict(sorted(files.items())),
    )
