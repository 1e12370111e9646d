"""Load a model by name: the public entry to the engine.

llm = llamita.load("embedded", scheme="llama3.2")
print(llm.generate("Once upon a time", max_tokens=100).text)
"""

from collections.abc import Mapping
from pathlib import Path

from llamita.engine.adapters import Adapter, prepare_adapter
from llamita.engine.llm import LLM, MAX_SEQUENCES
from llamita.errors import InputError
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
    scheme: str | QuantScheme | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    max_sequences: int = MAX_SEQUENCES,
    cache_memory: int | None = None,
    prefix_cache: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    progress: Progress = None,
    preset: str | QuantScheme | None = None,
) -> LLM:
    """Load a model: a checkpoint, a packed model, another tool's model, a hub name, or "embedded".

    Args:
        path_or_name: what to load; a float model stays float unless a scheme is given.
        scheme: round a float model to the nearest codes of this scheme while it loads; "none" and None leave it.
        threads: 1 to 1024, of the kernels, for the whole process; by default all of the machine's.
        context: tokens of a sequence at most; by default what the model was made for.
        kv_dtype: "f32", "f16" or "int8" for keys and values; by default "f32" for a float model, "f16"
            for a quantized one. "int8" takes little more than half the memory of "f16".
        max_sequences: generations that run at once; more wait.
        cache_memory: bytes for the keys and values of all sequences, each in whole blocks of 128 tokens;
            by default half of the memory that the process may use.
        prefix_cache: bytes of these to keep of ended sequences, for prompts that begin like them; by
            default what one whole context takes, at most an eighth of the memory. 0 turns it off.
        adapters: directories of low-rank adapters in PEFT's format, by the names that requests will give them.
        progress: gets how far the conversion of another tool's model is; see `system/progress.py`.
        preset: the former name of `scheme`.

    Raises:
        InputError, RunError: one line that says what is wrong.
    """
    use_threads(threads)
    source = open_source(path_or_name, progress)
    scheme = preset if scheme is None else scheme
    chosen = choose_scheme(scheme) if isinstance(scheme, str) else scheme
    if chosen is not None:
        if not isinstance(source, Checkpoint):
            raise InputError("scheme", "a float model", f"{path_or_name}, which is quantized")
        source = RoundedSource(source, chosen)
    return LLM(
        source,
        context=context,
        kv_dtype=kv_dtype,
        max_sequences=max_sequences,
        cache_memory=cache_memory,
        prefix_cache=prefix_cache,
        adapters=open_adapters(source, adapters or {}),
    )


def open_adapters(source: ModelSource, paths: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Read adapters of a model, each a directory in PEFT's format, by the names that requests will give them.

    Raises:
        InputError: an adapter is damaged, or was trained on a model with other channels than `source`.
        RunError: a file cannot be read.
    """
    if paths:
        check_fits(source, [Path(path) for path in paths.values()])
    config = source.config
    return {name: prepare_adapter(name, read_adapter(Path(path), config), config) for name, path in paths.items()}
