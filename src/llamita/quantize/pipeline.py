"""From a float checkpoint to a packed directory, module by module and in pieces of rows.

`quantize` reads top to bottom as the whole pipeline; `RoundedSource` gives the same numbers without a
directory. A chain of methods begins with the whole model and gives the rounded rows of each module.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita import __version__, _native
from llamita.errors import InputError
from llamita.methods import chain as chains
from llamita.methods.chain import Chain, RoundModule, parse_chain
from llamita.methods.setup import Setup
from llamita.models.card import CardFacts, model_card
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import describe_kinds
from llamita.models.metadata import ErrorRecord, Metadata, SourceRecord
from llamita.models.names import TRANSFORM
from llamita.models.packed import layout, tensor_bytes
from llamita.models.packed_writer import (
    SHARD_BYTES,
    PackedWriter,
    copy_companions,
    find_companions,
    plan_shards,
    stored_rotations,
    write_config,
)
from llamita.models.sizes import Plan, make_plan
from llamita.models.weights import FloatSource, as_stored, check_finite, transform_dtype
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.rounded import stored_scales
from llamita.system import processes
from llamita.system.files import FileTable, sha256_file, write_bytes
from llamita.system.kept_work import kept_work
from llamita.system.machine import MemoryWatch
from llamita.system.progress import Progress
from llamita.system.staging import check_space, check_target, staged

_ROWS = 1024  # rows of a float table copied at a time
SMALL_FILES = 64 * 2**20  # bytes allowed for tokenizer, licence and the like when space is checked
_WORST = 5  # layers named in summary and card


@dataclass(frozen=True)
class Summary:
    """What quantizing made: the plan, seconds, bytes of memory at the peak without pages of files (0 where it
    was not watched), and the error of every module as Σ(w - ŵ)² / Σw²."""

    out: Path
    plan: Plan
    seconds: float
    memory: int
    mean_squared_error: float
    relative_error: float
    errors: dict[str, float]

    def worst(self, count: int = _WORST) -> list[tuple[str, float]]:
        """The modules with the largest relative error, worst first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


def quantize(
    source: FloatSource, source_name: str, out: Path, scheme: QuantScheme, method: str = "rtn",
    setup: Setup | None = None, overwrite: bool = False, *, origin: FloatSource | None = None,
    extra: Mapping[str, bytes] | None = None, shard_bytes: int = SHARD_BYTES, progress: Progress = None,
) -> Summary:  # fmt: skip
    """Write `source`, rounded by `scheme`, to the directory `out`, which appears whole or not at all.

    Args:
        source_name: what the user called the source; it is recorded, a local directory by its whole path.
        origin: what `source` was trained from, where it was: that has the name, licence and tokenizer.
        method: a chain such as "rtn" or "spinquant+gptq+tune".
        setup: what methods that look at activations need.
        overwrite: replace an `out` that llamita made.
        extra: files to put beside the weights, by name.

    Raises:
        InputError: `out` exists, a layer does not fit the groups, weights are not finite, no UTF-8 path.
        RunError: disk full, no permission, or a file cannot be read.
    """
    began = time.perf_counter()
    chain, setup, origin = parse_chain(method), replace(setup or Setup(), progress=progress), origin or source
    recorded, shown = source_names(origin, source_name)
    companions = find_companions(origin.path)
    before = make_plan(origin.config, scheme, lambda name: origin.info(name).dtype)  # does it fit?
    check_target(out, overwrite, origin.path)
    record = source_record(origin, recorded, progress)
    watch, kept = MemoryWatch(), _work(out, chain, scheme, record, setup)
    with watch, kept as work, staged(out, overwrite, origin.path) as directory:
        setup = replace(setup, work=work)
        changed = chains.transform(source, chain, setup)
        plan = _plan(changed, scheme, shard_bytes, before.source_bytes)
        check_space(out, plan.file_bytes + SMALL_FILES)
        round_module = chains.begin(changed, scheme, chain, setup)
        files, sums = _write_weights(directory, changed, scheme, round_module, shard_bytes, progress)
        summary = _summarize(out, plan, time.perf_counter() - began, watch.peak, sums)
        rotations = stored_rotations(changed.rotations)
        files["config.json"] = write_config(directory, changed.hf_config, scheme, rotations)
        files |= copy_companions(origin.path, directory, companions)
        texts = {"README.md": _card(origin, shown, scheme, chain, setup, summary), **(extra or {})}
        files |= {file: write_bytes(directory / file, data) for file, data in texts.items()}
        _metadata(scheme, chain, setup, rotations, record, summary, files).write(directory)
    return summary


def _plan(changed: Checkpoint, scheme: QuantScheme, shard_bytes: int, source_bytes: int) -> Plan:
    """What will be written of the source after its transforms."""
    transform = transform_dtype(stored_rotations(changed.rotations))
    return make_plan(
        changed.config, scheme, lambda name: changed.info(name).dtype, shard_bytes, transform, source_bytes
    )


def _card(source: FloatSource, shown: str, scheme: QuantScheme, chain: Chain, setup: Setup, summary: Summary) -> bytes:
    plan = summary.plan
    return model_card(
        CardFacts(
            source_name=shown, source_path=source.path, scheme=scheme, version=__version__,
            kinds=describe_kinds(source.config, scheme), method=str(chain),
            scales=chain.scales(scheme.scale_rule), is_measured=chain.is_blockwise,
            source_bytes=plan.source_bytes, tensor_bytes=plan.tensor_bytes,
            relative_error=summary.relative_error, worst=summary.worst(), remark=_training(setup.settings),
        )
    ).encode()  # fmt: skip


def _training(settings: dict[str, Any]) -> str | None:
    """What the card says of a training, which leaves its record among the settings."""
    if "recipe" not in settings:
        return None
    stages, losses = len(settings["recipe"]["stages"]), settings["losses"]
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    after = f"; held-out loss before, and after each: {shown} nats a token" if losses else ""
    data = Path(settings["data"]["name"]).name
    return f"Trained on `{data}` in {stages} stage{'s' * (stages > 1)}, its rounding in the loop{after}."


def take_part(source: FloatSource, scheme: QuantScheme, method: str, setup: Setup) -> None:
    """What every process but the first does under torchrun: its part of a method's work, nothing written."""
    chain = parse_chain(method)
    if chain.needs_calibration(setup.settings):
        chains.begin(chains.transform(source, chain, setup), scheme, chain, setup)


def _work(
    out: Path, chain: Chain, scheme: QuantScheme, source: SourceRecord, setup: Setup
) -> AbstractContextManager[Path | None]:
    """Where the run keeps what it has finished; nowhere where that takes no time, or is done by several."""
    if not chain.needs_calibration(setup.settings) or processes.world() > 1:
        return nullcontext()
    calibration = setup.calibration.record() if setup.calibration else None
    return kept_work(out, {"llamita": __version__, "source": asdict(source), "scheme": scheme.to_dict(),
                           "method": str(chain), "settings": setup.settings, "seed": setup.seed,
                           "calibration": calibration})  # fmt: skip


def source_names(source: FloatSource, name: str) -> tuple[str, str]:
    """What llamita.json calls the source, and what the card calls it.

    A directory's relative path, seen from elsewhere, could be the name of a stranger's model on the hub:
    its whole path is recorded. The card, which others read, shows only its last part.
    """
    recorded = shown = name
    if Path(name) == source.path:  # as `resolve` gives it: a directory, not "embedded" nor a hub's download
        # "..", which may follow a symlink, is resolved; other symlinks keep the name they were given
        path = source.path.resolve() if ".." in source.path.parts else Path(os.path.abspath(source.path))
        recorded, shown = str(path), path.name
        if shown == "embedded":
            shown = "./embedded"  # not our own model, which has no licence of Meta's
    try:
        recorded.encode()
    except UnicodeEncodeError:
        raise InputError(f"{recorded!r}", "a path in UTF-8", hint="try renaming the directory") from None
    return recorded, shown


def _write_weights(
    directory: Path, source: Checkpoint, scheme: QuantScheme, round_module: RoundModule,
    shard_bytes: int, progress: Progress,
) -> tuple[FileTable, dict[str, tuple[float, float, int]]]:  # fmt: skip
    """Weight files, and squared error, energy and number of weights of each rounded module."""
    rotations = stored_rotations(source.rotations)
    transform = rotations.head_transform
    modules = layout(source.config, scheme, lambda name: source.info(name).dtype, transform_dtype(rotations))
    writer = PackedWriter(directory, plan_shards(modules, shard_bytes))
    sums: dict[str, tuple[float, float, int]] = {}
    total, done = sum(tensor_bytes(tensors) for tensors in modules.values()), 0
    try:
        for name, tensors in modules.items():
            if progress:
                progress(name, done, total)
            if f"{name}.weight_scale" in tensors:
                sums[name] = _write_rounded(writer, name, scheme, round_module(name))
            elif name == TRANSFORM and transform is not None:
                writer.put(name, transform)
            elif name in tensors:
                writer.put(name, source.stored_vector(name))
            else:
                dtype = source.info(f"{name}.weight").dtype
                _write_float(writer, name, as_stored(source.weight(name), dtype))
            done += tensor_bytes(tensors)
        writer.finish()
    finally:
        writer.abandon()
    return writer.files, sums


def _write_rounded(
    writer: PackedWriter, name: str, scheme: QuantScheme, pieces: Iterator[Any]
) -> tuple[float, float, int]:
    error, energy, count = 0.0, 0.0, 0
    for piece in pieces:
        scales = stored_scales(piece.scales, scheme)
        if scheme.kind(name).bits == 4:
            writer.put(f"{name}.weight_packed", _native.codes_to_packed(piece.codes))
        else:
            writer.put(f"{name}.weight", piece.codes)
        writer.put(f"{name}.weight_scale", scales)
        error, energy, count = error + piece.squared_error, energy + piece.energy, count + piece.codes.size
    return error, energy, count


def _write_float(writer: PackedWriter, name: str, table: np.ndarray) -> None:
    for start in range(0, len(table), _ROWS):
        piece = table[start : start + _ROWS]
        check_finite(f"{name}.weight", piece, start)
        writer.put(f"{name}.weight", piece)


def _summarize(
    out: Path, plan: Plan, seconds: float, memory: int, sums: dict[str, tuple[float, float, int]]
) -> Summary:
    error, energy, count = (sum(values) for values in zip(*sums.values(), strict=True))
    return Summary(
        out=out,
        plan=plan,
        seconds=seconds,
        memory=memory,
        mean_squared_error=error / count,
        relative_error=error / energy if energy else 0.0,
        errors={name: e / w if w else 0.0 for name, (e, w, _) in sums.items()},
    )


def source_record(source: FloatSource, name: str, progress: Progress) -> SourceRecord:
    """Which model this was made from: its name, and the SHA-256 of config and weight files."""
    files = {}
    for i, file in enumerate(["config.json", *source.files]):
        if progress:
            progress(f"reading {file}", i, 1 + len(source.files))
        files[file] = sha256_file(source.path / file)
    return SourceRecord(name, files)


def _metadata(
    scheme: QuantScheme, chain: Chain, setup: Setup, rotations: Rotations, source: SourceRecord,
    summary: Summary, files: FileTable,
) -> Metadata:  # fmt: skip
    measured = chain.needs_calibration(setup.settings)
    return Metadata(
        llamita=__version__,
        scheme=scheme,
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
