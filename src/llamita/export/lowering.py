"""Turn a program into an ExecuTorch file: torch.export, partition, serialize; and hash the data of such a file."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers the operators of its LLM runtime
from torch.export import Dim, export
from torch.fx.traceback import NodeSource

from llamita.export.program import Program

_TRACED = 3  # tokens of the traced pass: neither one nor the cache's length


def lower(program: Program, partitioners: list[Any], metadata: dict[str, Any], path: Path) -> None:
    """Write a program as a `.pte` file.

    Args:
        metadata: constant methods of the file by name, which runners call.
    """
    tokens = 1 if program.is_static else _TRACED
    example = (torch.ones(1, tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    count = {} if program.is_static else {1: Dim("count", min=1, max=program.context)}
    with _quick_passes(), torch.no_grad():
        exported = export(program, example, dynamic_shapes={"tokens": count, "input_pos": {}}, strict=False)
        edge = to_edge_transform_and_lower(
            exported, partitioner=partitioners, constant_methods=metadata,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )  # fmt: skip
        del exported
        made = edge.to_executorch(ExecutorchBackendConfig(
            extract_delegate_segments=True, do_quant_fusion_and_const_prop=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        ))  # fmt: skip
    with path.open("wb") as file:
        made.write_to_file(file)


def data_hashes(pte: Path) -> set[str]:
    """Return the SHA-256 of every piece of data that a program's delegates read, from the file's bytes."""
    named = deserialize_pte_binary(pte.read_bytes()).named_data
    return set() if named is None else {hashlib.sha256(bytes(data)).hexdigest() for data in named.buffers}


@contextmanager
def _quick_passes() -> Iterator[None]:
    """Silence ExecuTorch's passes, and share what they would copy.

    Every pass copies the graph, and with each node its origin, a tree of all earlier passes (Torch 2.13). The tree
    never changes, so the copies can share it.
    """
    known = NodeSource.__dict__.get("__deepcopy__")
    level = logging.root.manager.disable
    NodeSource.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if known is None:
            del NodeSource.__deepcopy__  # type: ignore[attr-defined]
        else:
            NodeSource.__deepcopy__ = known  # type: ignore[attr-defined]
