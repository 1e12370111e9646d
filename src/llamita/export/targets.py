"""List the targets of `llamita export --to`, each with the function that writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita.errors import InputError, shown
from llamita.export.job import ExportJob
from llamita.system.extras import load_optional
from llamita.system.progress import Progress


@dataclass(frozen=True)
class Target:
    """A format of other runtimes.

    Attributes:
        name: what `--to` takes.
        entry: "module:function", called as write(job, directory, progress). It fills the directory, returns what to
            record, and raises InputError for what the format cannot hold.
        content: what comes out, for people.
        use: code or a command that uses the result, or a sentence that says what to do; {out} is its directory.
        is_code: whether `use` is code or a command.
        options: names of the options that the target takes.
    """

    name: str
    entry: str
    content: str
    use: str
    is_code: bool = True
    options: tuple[str, ...] = ()

    def usage(self, out: str) -> str:
        """Return `use` as a sentence of Markdown."""
        use = self.use.format(out=out)
        return f"To use it: `{use}`." if self.is_code else f"Next: {use}."


_TRANSFORMERS = "AutoModelForCausalLM.from_pretrained('{out}')"
TARGETS = {
    target.name: target
    for target in (
        Target(
            "executorch", "llamita.export.executorch:write",
            "a .pte program for ExecuTorch: phones, and its runtimes elsewhere",
            "{out}/README.md says what goes where on a phone", is_code=False,
            options=("context", "backend", "embedding", "adapter", "round_scales"),
        ),
        Target(
            "adapters", "llamita.export.adapters:write", "adapters in PEFT's format, checked to fit DIR",
            "PeftModel.from_pretrained(base, '{out}')", options=("adapter",),
        ),
        Target(
            "compressed-tensors", "llamita.export.compressed_tensors:write", "safetensors for transformers and vLLM",
            _TRANSFORMERS, options=("flavor",),
        ),
        Target(
            "gguf", "llamita.export.gguf:write", "one .gguf file for llama.cpp, Q4_0 and Q8_0",
            "llama-cli -m {out}/model.gguf -p TEXT", options=("round_scales",),
        ),
        Target("hf", "llamita.export.hf:write", "an ordinary checkpoint in BF16, multiplied out", _TRANSFORMERS),
        Target(
            "meta", "llamita.export.meta:write", "consolidated.00.pth, as Meta's quantized releases",
            "give it to a tool that reads Meta's quantized Llama 3.2, such as ExecuTorch's own export", is_code=False,
            options=("adapter",),
        ),
        Target(
            "torchao", "llamita.export.torchao:write", "safetensors with torchao's tensors, for transformers",
            _TRANSFORMERS,
        ),
    )
}  # fmt: skip
_ALIASES = {"adaptors": "adapters"}


def find_target(name: str) -> Target:
    """Return the target of this name, or of its former name.

    Raises:
        InputError: no such target.
    """
    found = TARGETS.get(_ALIASES.get(name, name))
    if found is None:
        raise InputError("--to", f"one of {', '.join(TARGETS)}", shown(name) if name else "none")
    return found


def writer_of(target: Target) -> Callable[[ExportJob, Path, Progress], dict[str, Any]]:
    """Return the function that writes a target; raise RunError where its package is missing."""
    lacking = (
        f"--to {target.name}: expected the package {{package}}, got none; try pip install 'llamita[export]' "
        "(in a checkout '.[export]')"
    )
    return load_optional(target.entry, lacking)
