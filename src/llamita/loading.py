"""Load a model by name: the public entry to the engine.

llm = llamita.load("embedded", scheme="llama3.2")
print(llm.generate("Once upon a time", max_tokens=100).text)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamita.engine.adapters import Adapter, prepare_adapter
from llamita.engine.llm import LLM, MAX_SEQUENCES
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError
from llamita.imports.names import at_revision
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.models.peft import read_adapter
from llamita.models.weights import ModelSource
from llamita.numerics.scheme import QuantScheme, choose_scheme
from llamita.quantize.lineage import check_fits
from llamita.quantize.rounded import RoundedSource
from llamita.system.progress import Progress
from llamita.system.threads import use_threads


def load(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    scheme: str | QuantScheme | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    float_math: str = FLOAT_MATHS[0],
    max_sequences: int = MAX_SEQUENCES,
    cache_memory: int | None = None,
    prefix_cache: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    draft_from: Sequence[str | Path] | None = None,
    progress: Progress = None,
    preset: str | QuantScheme | None = None,
    adaptors: Mapping[str, str | Path] | None = None,
) -> LLM:
    """Load a model: a checkpoint, a packed model, another tool's model, a hub name, or "embedded".

    Args:
        path_or_name: a float model stays float unless a scheme is given.
        revision: a branch, tag or commit of the hub's model, in place of "@REVISION" in its name.
        scheme: round a float model to nearest by this scheme while it loads; "none" and None do not.
        threads: 1 to 1024 threads for the kernels of the whole process; by default one for each usable core.
        context: the most tokens of a sequence; by default the model's own context.
        kv_dtype: "f32", "f16" or "int8" for keys and values; by default "f32" for a float model, else "f16".
        float_math: "f32", or "bf16" to round the inputs of bf16 weights, for speed, on AVX-512 BF16 alone.
        max_sequences: how many generations run at once; more wait.
        cache_memory: bytes for all keys and values, in blocks of 128 tokens; by default half of what may be used.
        prefix_cache: bytes of these to keep for prompts that begin alike; by default of one context; 0 for none.
        adapters: directories of low-rank adapters in PEFT's format, by the names that requests give them.
        draft_from: text files, 16 MiB together, whose words answers may repeat: those come faster then.
        progress: gets how far the conversion of another tool's model is; see `system/progress.py`.
        preset, adaptors: the former names of `scheme` and `adapters`.

    Raises:
        InputError, RunError: one line that says what is wrong.
    """
    use_threads(threads)
    source = open_model(at_revision(path_or_name, revision), preset if scheme is None else scheme, progress)
    return LLM(
        source, context=context, kv_dtype=kv_dtype, float_math=float_math, max_sequences=max_sequences,
        cache_memory=cache_memory, prefix_cache=prefix_cache,
        adapters=open_adapters(source, adapters or adaptors or {}), draft_from=draft_from,
    )  # fmt: skip


def open_model(name: str | Path, scheme: str | QuantScheme | None = None, progress: Progress = None) -> ModelSource:
    """Open the weights of a model, rounded to nearest by a scheme if there is one, for `LLM`; see `load`."""
    source = open_source(name, progress)
    if isinstance(scheme, str):
        try:
            scheme = choose_scheme(scheme)
        except InputError as error:
            raise error.at("scheme") from None
    if scheme is None:
        return source
    if not isinstance(source, Checkpoint):
        raise InputError("scheme", "a float model", f"{name}, which is quantized")
    try:
        return RoundedSource(source, scheme)
    except InputError as error:
        if error.hint and error.hint.startswith("try --group-size"):  # an option of quantize
            error.hint = "try scheme llama3.2, which has groups of 32"
        raise


def open_adapters(source: ModelSource, paths: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Read adapters of a model, each a directory in PEFT's format, by the names that requests give them.

    Raises:
        InputError: an adapter is damaged, or was trained on a model whose channels are not those of `source`.
        RunError: a file cannot be read.
    """
    if paths:
        check_fits(source, [Path(path) for path in paths.values()])
    config = source.config
    return {name: prepare_adapter(name, read_adapter(Path(path), config), config) for name, path in paths.items()}
