"""Choose ExecuTorch's partitioners for a backend: they hand parts of a program to it. Say what it needs installed."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llamita.errors import InputError, RunError, shown


@dataclass(frozen=True)
class Backend:
    """A backend that runs programs.

    Attributes:
        make: returns its partitioners.
        is_static: whether it needs plain operators of one shape, for one token at a time.
        rounds: whether it rounds activations to int8 per token; if not, they stay float.
        grid: the type of the scales of groups, "bf16" or "f16".
    """

    make: Callable[[], list[Any]]
    is_static: bool = False
    rounds: bool = True
    grid: str = "bf16"


def partitioners_of(backend: str) -> list[Any]:
    """Return ExecuTorch's partitioners for a backend.

    Raises:
        InputError: no such backend.
        RunError: its package or SDK is missing; nothing is downloaded.
    """
    if backend not in BACKENDS:
        raise InputError("--backend", f"one of {', '.join(BACKENDS)}", shown(backend))
    try:
        with quiet():
            return BACKENDS[backend].make()
    except ImportError as error:
        hint = "try its page at docs.pytorch.org/executorch, or --backend xnnpack"
        raise RunError(f"--backend {backend}", "its packages", f"{error}", hint) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the remarks and progress bars of packages."""
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
    # A linear layer needs this one of XNNPACK's 17 passes. All of them, on every part, took a third of the export.
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

    # iOS 18 is the first with weights in 4-bit groups. Other units than the CPU can take long to load; ExecuTorch's own
    # exporter has the CPU alone, too. Caches stay ExecuTorch's, whose runtime keeps none as Core ML's state.
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18, compute_unit=coremltools.ComputeUnit.CPU_ONLY,
        compute_precision=coremltools.precision.FLOAT16, model_type=CoreMLBackend.MODEL_TYPE.MODEL,
    )  # fmt: skip
    return [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=False)]


def _qnn() -> list[Any]:
    if not os.environ.get("QNN_SDK_ROOT"):  # without it, the import would download an SDK
        expected, hint = "Qualcomm's AI Engine Direct SDK in QNN_SDK_ROOT", "try installing it from qpm.qualcomm.com"
        raise RunError("--backend qnn", expected, "none", hint)
    from executorch.extension.llm.export.partitioner_lib import get_qnn_partitioner

    return [get_qnn_partitioner(use_kv_cache=True)]


def _mediatek() -> list[Any]:
    if find_spec("mtk_converter") is None:
        hint = "try installing it from neuropilot.mediatek.com"
        raise RunError("--backend mediatek", "MediaTek's NeuroPilot Express SDK (mtk_converter)", "none", hint)
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
