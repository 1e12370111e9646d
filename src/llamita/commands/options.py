"""Define each option that more than one command takes, with its line in `--help`, once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.engine.kv_cache import KV_DTYPES
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError
from llamita.imports.names import at_revision
from llamita.numerics.scheme import GROUP_SIZES, PRESETS


# The model and what it is compared with
def model_argument(metavar: str, what: str = "A model, or 'embedded'", takes_gguf: bool = True) -> Any:
    """Return the argument of a command that takes a model; `--revision` is added to its name."""
    names = "directory, file or hub name (owner/model, owner/model:Q4_K_M)"
    names = f"by {names if takes_gguf else 'directory or hub name (owner/model)'}"
    return typer.Argument(metavar=metavar, help=f"{what}; {names}.", callback=_at_revision)


def _at_revision(context: typer.Context, value: Any) -> Any:
    revision = context.params.get("revision")  # an eager option, so that it is there before any argument
    if revision is None:
        return value
    if isinstance(value, list):
        return [at_revision(name, revision) for name in value]
    if value is None:  # no model, or --shape
        raise InputError("revision", "a model's name on the hub, such as owner/model", "none")
    return at_revision(value, revision)


Model = Annotated[str, model_argument("MODEL")]
Models = Annotated[list[str], model_argument("SRC", "Models, 'embedded', or SRC:SCHEME")]
# Commands leave it to `model_argument`.
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        is_eager=True,
        help="Take the hub's model at this branch, tag or commit; the same as owner/model@REV.",
    ),
]
Shape = Annotated[
    str | None, typer.Option("--shape", help="Use a published shape instead: 1b, 3b, 8b (Llama 3.2, 3.1).")
]

# How weights are stored
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help=f"Weights that share a scale: {', '.join(map(str, GROUP_SIZES))}; by default what the scheme says.",
    ),
]
FitGroups = Annotated[
    bool,
    typer.Option(
        "--fit-groups",
        help="If the group size does not divide a layer's inputs, use the next smaller one for that layer.",
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        "--preset",
        help=f"Round a float model to this scheme while it loads: {', '.join(PRESETS)}; by default it stays float.",
    ),
]

# What is made
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The directory to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if llamita made it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# How it is computed
# No range here: `system.threads.use_threads` refuses a wrong count, from here and from LLAMITA_THREADS alike.
Threads = Annotated[int | None, typer.Option("--threads", help="Threads to use, 1 to 1024; all cores by default.")]
Context = Annotated[
    int | None, typer.Option("--context", min=1, help="Most tokens of a sequence; by default what the model allows.")
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help=f"Type of keys and values: {', '.join(KV_DTYPES)}; by default f32 for a float model, else f16.",
    ),
]
FloatMath = Annotated[
    str,
    typer.Option(
        "--float-math",
        help=f"Multiply float layers in {' or '.join(FLOAT_MATHS)}; bf16 rounds the inputs of BF16 weights, for speed.",
    ),
]
AdapterPath = Annotated[
    Path | None,
    typer.Option(
        "--adapter", "--adaptor", metavar="DIR", help="Use this low-rank adapter, in the format of Hugging Face's PEFT."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed.")]

# What methods calibrate on
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Text to calibrate on: self (the default), self-fast, a file, a hub data set.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens per calibration sample.")]

# What is measured
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="The text to score; by default one that ships with llamita."),
]
ChunkTokens = Annotated[int, typer.Option("--max-seq-len", min=2, help="Tokens that a model sees at a time.")]

# How text is generated
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Below 1 is safer, above 1 is wilder, 0 is greedy.")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Draw from the likeliest tokens whose probabilities sum to this.")
]
DrawSeed = Annotated[int | None, typer.Option("--seed", help="Random seed; by default every run differs.")]
Speculate = Annotated[
    int, typer.Option("--speculate", help="Most tokens to draft from earlier text and verify together; 0 for none.")
]
DraftFrom = Annotated[
    list[Path] | None,
    typer.Option(
        "--draft-from",
        metavar="FILE",
        help="Draft from this text, too: what answers repeat of it comes faster; repeatable.",
    ),
]
