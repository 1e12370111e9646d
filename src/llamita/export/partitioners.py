"""ExecuTorch's backends: what hands parts of a program to each, and what each needs to be installed."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from llamita.errors import InputError, RunError

_IOS = 18  # the first with weights in 4-bit groups


def partitioners_of(backend: str) -> list[Any]:
    """ExecuTorch's partitioners for a backend by its name.

    Raises:
        InputError: no such backend.
        RunError: its package or SDK is missing; nothing is downloaded.
    """
    if backend not in BACKENDS:
        raise InputError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    try:
        return BACKENDS[backend]()
    except ImportError as error:
        raise RunError(f"--backend {backend}: expected its packages, got: {error}; try its page at "
                       "docs.pytorch.org/executorch, or --backend xnnpack") from None  # fmt: skip


def _xnnpack() -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
    )
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
    from executorch.extension.llm.export.partitioner_lib import get_coreml_partitioner

    return [get_coreml_partitioner(ios=_IOS)]


def _qnn() -> list[Any]:
    if not os.environ.get("QNN_SDK_ROOT"):  # else importing it would download one
        raise RunError("--backend qnn: expected Qualcomm's AI Engine Direct SDK in QNN_SDK_ROOT, found none; "
                       "try installing it from qpm.qualcomm.com")  # fmt: skip
    from executorch.extension.llm.export.partitioner_lib import get_qnn_partitioner

    return [get_qnn_partitioner(use_kv_cache=True)]


def _mediatek() -> list[Any]:
    if find_spec("mtk_converter") is None:
        raise RunError("--backend mediatek: expected MediaTek's NeuroPilot Express SDK (mtk_converter), "
                       "found none; try installing it from neuropilot.mediatek.com")  # fmt: skip
    from executorch.backends.mediatek.partitioner import NeuropilotPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return [NeuropilotPartitioner([CompileSpec("platform-config", b"mt6989")])]


BACKENDS: dict[str, Callable[[], list[Any]]] = {
    "xnnpack": _xnnpack,
    "vulkan": _vulkan,
    "coreml": _coreml,
    "qnn": _qnn,
    "mediatek": _mediatek,
}
