"""List the contenders: environments, the models made for each engine, and every engine's settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAYERS = 16  # of Llama 3.2 1B
PART_LAYERS = (2, 4)  # ExecuTorch's times are extrapolated from these


@dataclass(frozen=True)
class Case:
    """A case to time: `sequences` prompts of `prompt` random tokens, then `new` greedy tokens after each."""

    prompt: int
    new: int
    sequences: int = 1


CASES = {
    "512": Case(512, 64),
    "64": Case(64, 32),  # what "64x8" is compared with
    "64x8": Case(64, 32, sequences=8),
    "8192": Case(8192, 16),
}


@dataclass(frozen=True)
class Contender:
    """One engine with one model.

    Attributes:
        label: how tables name it.
        environment: whose Python runs it; "" is the one that runs the harness.
        worker: its script, next to this file.
        model: a key of MODELS.
        weights: "4-bit", "BF16" or "FP32".
        variants: settings to choose the fastest from with --tune; the first is the default.
        cases: keys of CASES that it can run.
        layers: fewer than LAYERS where times are extrapolated.
        alone: it needs too much memory to be loaded together with the others.
    """

    label: str
    environment: str
    worker: str
    model: str
    weights: str
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    cases: tuple[str, ...] = tuple(CASES)
    layers: int = LAYERS
    alone: bool = False


_FLASH = {"flash": {"flash": True}, "no flash": {"flash": False}}
# What prefills fastest changes with the size of the groups that activations are quantized in, what decodes
# fastest with the precision between layers.
_OPENVINO_GROUPS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "INFERENCE_PRECISION_HINT": "f32"}
_OPENVINO = {
    "paged, groups of 128, f32": {"attention": "PA", "properties": _OPENVINO_GROUPS},
    "sdpa, groups of 128, f32": {"attention": "SDPA", "properties": _OPENVINO_GROUPS},
    "paged, groups of 128, f32, f16 cache": {
        "attention": "PA",
        "properties": {**_OPENVINO_GROUPS, "KV_CACHE_PRECISION": "f16"},
    },
    "paged, groups of 128": {"attention": "PA", "properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}},
    "paged, as it comes": {"attention": "PA"},
}

CONTENDERS: dict[str, Contender] = {
    "llamita-g128": Contender("llamita, groups of 128", "", "work_llamita.py", "llamita-g128", "4-bit"),
    "llamita-g32": Contender("llamita, groups of 32", "", "work_llamita.py", "llamita-g32", "4-bit"),
    "llamita-bf16": Contender("llamita BF16", "", "work_llamita.py", "checkpoint", "BF16"),
    "llamita-bf16-fast": Contender(
        "llamita BF16, float math bf16",
        "",
        "work_llamita.py",
        "checkpoint",
        "BF16",
        {"float math bf16": {"float_math": "bf16"}},
    ),
    "llamacpp-q4_0": Contender("llama.cpp Q4_0", "llamacpp", "work_llamacpp.py", "llamacpp-q4_0.gguf", "4-bit", _FLASH),
    "llamacpp-q4_k_s": Contender(
        "llama.cpp Q4_K_S", "llamacpp", "work_llamacpp.py", "llamacpp-q4_k_s.gguf", "4-bit", _FLASH
    ),
    "llamacpp-bf16": Contender("llama.cpp BF16", "llamacpp", "work_llamacpp.py", "llamacpp-bf16.gguf", "BF16", _FLASH),
    "openvino-int4": Contender(
        "OpenVINO int4, groups of 128", "openvino", "work_openvino.py", "openvino-int4", "4-bit", _OPENVINO
    ),
    **{
        f"executorch-{layers}": Contender(
            f"ExecuTorch 8da4w, groups of 32, {layers} layers",
            "executorch",
            "work_executorch.py",
            f"executorch-{layers}.pte",
            "4-bit",
            cases=("512",),
            layers=layers,
        )
        for layers in PART_LAYERS
    },
    "transformers-bf16": Contender(
        "transformers BF16",
        "transformers",
        "work_transformers.py",
        "checkpoint",
        "BF16",
        {"eager": {"dtype": "bfloat16"}},
        cases=("512", "64", "64x8"),
    ),
    "transformers-fp32": Contender(
        "transformers FP32",
        "transformers",
        "work_transformers.py",
        "checkpoint",
        "FP32",
        {"eager": {"dtype": "float32"}},
        cases=("512",),
        alone=True,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A way to make a model.

    Attributes:
        environment: whose Python runs the command.
        source: the model it is made from, "" for none.
        command: from (source, out) to what follows the Python executable.
    """

    environment: str
    source: str
    command: Callable[[Path, Path], list[str]]


def _script(name: str, *last: str) -> Callable[[Path, Path], list[str]]:
    return lambda source, out: [str(HERE / name), str(source), str(out), *last]


def _checkpoint(layers: int) -> Recipe:
    maker = HERE.parent / "random_checkpoint.py"
    return Recipe("", "", lambda _, out: [str(maker), str(out), "--layers", str(layers)])


def _quantized(*extra: str) -> Recipe:
    return Recipe(
        "",
        "checkpoint",
        lambda source, out: [
            *(
                "-c",
                "from llamita.cli import main; main()",
                "quantize",
                str(source),
                "-o",
                str(out),
                "--preset",
                "llama3.2",
                *extra,
            )
        ],
    )


MODELS: dict[str, Recipe] = {
    "checkpoint": _checkpoint(LAYERS),
    "llamita-g128": _quantized("--group-size", "128"),
    "llamita-g32": _quantized(),
    "llamacpp-bf16.gguf": Recipe("llamacpp", "checkpoint", _script("make_gguf.py", "bf16")),
    "llamacpp-q4_0.gguf": Recipe("llamacpp", "llamacpp-bf16.gguf", _script("make_gguf.py", "q4_0")),
    "llamacpp-q4_k_s.gguf": Recipe("llamacpp", "llamacpp-bf16.gguf", _script("make_gguf.py", "q4_k_s")),
    # Symmetric int4 in groups of 128; embedding and head int8, as the exporter does by default.
    "openvino-int4": Recipe(
        "openvino",
        "checkpoint",
        lambda source, out: [
            *("-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(source)),
            *("--task", "text-generation-with-past", "--weight-format", "int4", "--sym"),
            *("--group-size", "128", "--ratio", "1.0", str(out)),
        ],
    ),
}
for _layers in PART_LAYERS:
    MODELS[f"checkpoint-{_layers}"] = _checkpoint(_layers)
    MODELS[f"executorch-{_layers}.pte"] = Recipe("executorch", f"checkpoint-{_layers}", _script("make_executorch.py"))
