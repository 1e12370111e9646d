"""What `llamita export --to` knows: each form, and where the function is that writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.export.job import ExportJob
from llamita.system.extras import load_optional
from llamita.system.progress import Progress


@dataclass(frozen=True)
class Target:
    """A form of other runtimes.

    Attributes:
        entry: "module:function", called as write(job, directory, progress), which fills the directory and
            gives what to record; it raises InputError for what the form cannot hold.
        form: what comes out, for people.
        following: what to do with OUT next.
        options: names of the options that it takes.
    """

    entry: str
    form: str
    following: str
    options: tuple[str, ...] = ()


_TRANSFORMERS = "try: AutoModelForCausalLM.from_pretrained('{out}')"
TARGETS: dict[str, Target] = {
    "executorch": Target(
        "llamita.export.executorch:write",
        "a .pte program for ExecuTorch: phones, and its runtimes elsewhere",
        "next: {out}/README.md says what goes where on a phone",
        ("context", "backend", "embedding", "adapter", "round_scales"),
    ),
    "adapters": Target(
        "llamita.export.adapters:write",
        "adapters in PEFT's form, found to fit DIR",
        "try: PeftModel.from_pretrained(base, '{out}')",
        ("adapter",),
    ),
    "compressed-tensors": Target(
        "llamita.export.compressed_tensors:write", "safetensors for transformers and vLLM", _TRANSFORMERS, ("flavor",)
    ),
    "gguf": Target(
        "llamita.export.gguf:write",
        "one .gguf file for llama.cpp, Q4_0 and Q8_0",
        "try: llama-cli -m {out}/model.gguf -p TEXT",
        ("round_scales",),
    ),
    "hf": Target("llamita.export.hf:write", "an ordinary checkpoint in BF16, multiplied out", _TRANSFORMERS),
    "meta": Target(
        "llamita.export.meta:write",
        "consolidated.00.pth, as Meta's quantized releases",
        "next: what takes Meta's quantized Llama 3.2, such as ExecuTorch's own export",
        ("adapter",),
    ),
    "torchao": Target(
        "llamita.export.torchao:write", "safetensors with torchao's tensors, for transformers", _TRANSFORMERS
    ),
}
_LACKING = (
    "--to {target}: expected the package {{package}}, found none; try pip install 'llamita[export]' "
    "(in a checkout '.[export]')"
)


def writer_of(target: str) -> Callable[[ExportJob, Path, Progress], dict[str, Any]]:
    """The function that writes a target.

    Raises:
        InputError: no such target.
        RunError: its package is missing.
    """
    if target not in TARGETS:
        raise InputError("--to", f"one of {', '.join(TARGETS)}", f"{target!r}")
    return load_optional(TARGETS[target].entry, _LACKING.format(target=target))
