"""What a packed model records of its making: its source in llamita.json, and the model card."""

import os
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.errors import InputError
from llamita.methods.chain import Chain
from llamita.methods.setup import Setup
from llamita.models.card import CardFacts, model_card
from llamita.models.layer_kinds import describe_kinds
from llamita.models.metadata import SourceRecord
from llamita.models.sizes import Plan
from llamita.models.weights import FloatSource
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import sha256_file
from llamita.system.progress import Progress


def source_names(source: FloatSource, name: str) -> tuple[str, str]:
    """Return what llamita.json calls the source, and what the card calls it.

    A directory is recorded by its whole path, because its relative path, seen from elsewhere, could be the name of
    another model on the hub. The card, which others read, shows only the last part.
    """
    recorded = shown = name
    if Path(name) == source.path:  # as `resolve` returns it: a directory, not "embedded" nor a download
        # Resolve "..", which may follow a symlink; other symlinks keep the name that the user gave.
        path = source.path.resolve() if ".." in source.path.parts else Path(os.path.abspath(source.path))
        recorded, shown = str(path), path.name
        if shown == "embedded":
            shown = "./embedded"  # not our own model, which has no licence of Meta's
    try:
        recorded.encode()
    except UnicodeEncodeError:
        raise InputError(f"{recorded!r}", "a path in UTF-8", hint="try renaming the directory") from None
    return recorded, shown


def source_record(source: FloatSource, name: str, progress: Progress) -> SourceRecord:
    """Return the record of a source: its name, and the SHA-256 of its config and weight files."""
    files = {}
    paths = {"config.json": source.path / "config.json"} | {file: own.path for file, own in source.files.items()}
    for i, (file, path) in enumerate(paths.items()):
        if progress:
            progress(f"reading {file}", i, len(paths))
        files[file] = sha256_file(path)
    return SourceRecord(name, files)


def card(
    source: FloatSource, shown: str, scheme: QuantScheme, chain: Chain, setup: Setup, plan: Plan,
    relative_error: float, worst: list[tuple[str, float]],
) -> bytes:  # fmt: skip
    """Return the model card of a packed model.

    Args:
        shown: what the card calls the source.
        worst: modules with the largest errors.
    """
    return model_card(
        CardFacts(
            source_name=shown, source_path=source.path, scheme=scheme, version=__version__,
            kinds=describe_kinds(source.config, scheme), method=str(chain),
            scales=chain.scales(scheme.scale_rule), is_measured=chain.is_blockwise,
            source_bytes=plan.source_bytes, tensor_bytes=plan.tensor_bytes,
            relative_error=relative_error, worst=worst, remark=_training(setup.settings),
        )
    ).encode()  # fmt: skip


def _training(settings: dict[str, Any]) -> str | None:
    """Return what the card says of a training, which leaves its record among the settings."""
    if "recipe" not in settings:
        return None
    stages, losses = len(settings["recipe"]["stages"]), settings["losses"]
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    after = f"; held-out loss before, and after each: {shown} nats a token" if losses else ""
    data = Path(settings["data"]["name"]).name
    return f"Trained on `{data}` in {stages} stage{'s' * (stages > 1)}, its rounding in the loop{after}."
