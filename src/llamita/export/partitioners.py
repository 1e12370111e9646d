"""ExecuTorch's backends: what hands parts of a program to each, and what each needs to be installed."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llamita.errors import InputError, RunError


@dataclass(frozen=True)
class Backend:
    """What runs programs.

    Attributes:
        make: its partitioners.
        is_static: whether it takes plain operators of one shape alone, a token at a time.
        rounds: whether it rounds activations to int8 per token; else they are float.
        grid: of scales of groups, "bf16" or "f16".
    """

    make: Callable[[], list[Any]]
    is_static: bool = False
    rounds: bool = True
    grid: str = "bf16"


def partitioners_of(backend: str) -> list[Any]:
    """ExecuTorch's partitioners for a backend by its name.

    Raises:
        InputError: no such backend.
        RunError: its package or SDK is missing; nothing is downloaded.
    """
    if backend not in BACKENDS:
        raise InputError("--backend", f"one of {', '.join(BACKENDS)}", f"{backend!r}")
    try:
        with quiet():
            return BACKENDS[backend].make()
    except ImportError as error:
        raise RunError(
            f"--backend {backend}",
            f"its packages, got: {error}",
            hint="try its page at docs.pytorch.org/executorch, or --backend xnnpack",
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what packages say of themselves: remarks, bars of progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _xnnpack() -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackDynamicallyQuantizedPartitioner()
    # Of XNNPACK's 17 passes a linear layer needs this one. All of them, on every part, took a third of the
    # time of an export.
    spec = CompileSpec("dqlinear_partitioner", b"")
    partitioner.delegation_spec = DelegationSpec("XnnpackBackend", [spec])
    return [partitioner]


def _vulkan() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({"require_dynamic_shapes": True})]


def _coreml() -> list[Any]:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # iOS 18 is the first with weights in 4-bit groups. The CPU alone, as ExecuTorch's own exporter has it:
    # others can take long to load. Caches stay ExecuTorch's, whose runtime keeps none as Core ML's state.
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18, compute_unit=coremltools.ComputeUnit.CPU_ONLY,
        compute_precision=coremltools.precision.FLOAT16, model_type=CoreMLBackend.MODEL_TYPE.MODEL,
    )  # fmt: skip
    return [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=False)]


def _qnn() -> list[Any]:
    if not os.environ.get("QNN_SDK_ROOT"):  # else importing it would download one
        raise RunError(
            "--backend qnn",
            "Qualcomm's AI Engine Direct SDK in QNN_SDK_ROOT",
            "none",
            "try installing it from qpm.qualcomm.com",
        )
    from executorch.extension.llm.export.partitioner_lib import get_qnn_partitioner

    return [get_qnn_partitioner(use_kv_cache=True)]


def _mediatek() -> list[Any]:
    if find_spec("mtk_converter") is None:
        raise RunError(
            "--backend mediatek",
            "MediaTek's NeuroPilot Express SDK (mtk_converter)",
            "none",
            "try installing it from neuropilot.mediatek.com",
        )
    from executorch.backends.mediatek.partitioner import NeuropilotPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return [NeuropilotPartitioner([CompileSpec("platform-config", b"mt6989")])]


BACKENDS = {
    "xnnpack": Backend(_xnnpack),
    "vulkan": Backend(_vulkan),
    "coreml": Backend(_coreml, is_static=True, rounds=False, grid="f16"),
    "qnn": Backend(_qnn, is_static=True, rounds=False),
    "mediatek": Backend(_mediatek, is_static=True, rounds=False),
}
