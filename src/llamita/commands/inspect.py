"""`llamita inspect`: show what a model directory holds."""

from collections import Counter
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import Json
from llamita.commands.sources import convert_first
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import count_kinds
from llamita.models.names import expected_tensors
from llamita.models.packed import PackedModel

_WORST = 5  # layers shown without --layers

_Directory = Annotated[
    str, typer.Argument(metavar="DIR", help="A model directory, another tool's model, a hub name, or 'embedded'.")
]
_Layers = Annotated[
    bool, typer.Option("--layers", help=f"Show the error of every layer, not of the worst {_WORST} only.")
]


def command(directory: _Directory, layers: _Layers = False, json: Json = False) -> None:
    """Show a model's shape, scheme, size, origin, and the errors of its layers.

    Example: llamita inspect my-model
    """
    convert_first(directory, quiet=json)
    source = open_source(directory)
    assert isinstance(source, Checkpoint | PackedModel)
    values = facts(source)
    source.close()
    if json:
        console.print_json(values)
        return
    shown = dict(values)
    if "source" in values:
        shown |= {"source": values["source"]["name"], "rotations": _rotations(values["rotations"])}
    if values["scheme"]:  # layers of another kind are listed with the errors
        shown["scheme"] = {key: value for key, value in values["scheme"].items() if key != "layers"}
    rows = [[key.replace("_", " "), _text(value)] for key, value in shown.items() if key != "layer_errors"]
    console.print_table(directory, ["what", "value"], rows)
    worst = sorted(values["layer_errors"].items(), key=lambda item: -item[1])
    if worst:
        listed = worst if layers else worst[:_WORST]
        kinds = {name: source.scheme.kind(name).name for name, _ in worst} if source.scheme else {}
        console.print_table(
            "relative squared error, worst first",
            ["layer", "stored as", "error"],
            [[name, kinds.get(name, ""), f"{error:.3e}"] for name, error in listed],
        )


def facts(source: Checkpoint | PackedModel) -> dict[str, Any]:
    """Return what there is to know about an open model, as JSON values."""
    config = source.config
    infos = [info for file in source.files.values() for info in file.tensors.values()]
    sizes: Counter[str] = Counter()
    for info in infos:
        sizes[info.dtype] += info.stop - info.start
    weights = 0
    for shape in expected_tensors(config).values():
        weights += shape[0] * (shape[1] if len(shape) > 1 else 1)
    values: dict[str, Any] = {
        "path": str(source.path),
        "weights": weights,
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.context,
        "rope": config.rope.kind,
        "tied": config.tied,
        "files": list(source.files),
        "tensor_bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
        "scheme": source.scheme.to_dict() if source.scheme else None,
        "layers_by_kind": count_kinds(config, source.scheme) if source.scheme else None,
        "layer_errors": {},
    }
    if isinstance(source, PackedModel):
        metadata = source.metadata.to_dict()
        for key in ("llamita", "method", "settings", "seed", "rotations", "calibration", "source", "float_layers"):
            values[key] = metadata[key]
        values["relative_error"] = source.metadata.error.relative
        values["layer_errors"] = source.metadata.error.layers
    return values


def _rotations(rotations: list[dict[str, Any]]) -> str:
    """Return the names of rotations, with the size of the one that the engine applies at run time."""
    sizes = {r["name"]: f" of {r['size']:,} inputs at run time" for r in rotations if "size" in r}
    return ", ".join(r["name"] + sizes.get(r["name"], "") for r in rotations) or "none"


def _text(value: Any) -> str:
    """Return a value for people to read: mappings as `key value` pairs, large numbers with separators."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)  # no control sequences from a stranger's file
    return "none" if value is None else f"{value:.3e}" if isinstance(value, float) else str(value)
