"""Run ExecuTorch's XNNPACK backend as a contender: its exported forward pass, called token by token."""

from importlib.metadata import version
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized
import numpy as np
import protocol
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

_OPERATORS = (executorch.extension.llm.custom_ops, executorch.kernels.quantized)  # importing registers them


class ExecuTorch:
    """One exported program; its cache is part of it and is overwritten from position 0."""

    def __init__(self, options: dict[str, Any]) -> None:
        portable_lib._unsafe_reset_threadpool(options["threads"])
        self.program = Runtime.get().load_program(options["model"])
        method = self.program.load_method("forward")
        assert method is not None
        self.method = method
        self.position = 0
        self.about = {
            "version": f"executorch {version('executorch')}, torch {torch.__version__}",
            "settings": {
                "threads": portable_lib._threadpool_get_thread_count(),
                "backend": "XNNPACK",
                "scheme": "8da4w, groups of 32, head included; embedding int4",
                "kv_dtype": "f32",
            },
        }

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        """Return logits (vocab,) after the last of these ids (tokens,)."""
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        out = self.method.execute([tokens, torch.tensor([self.position])])[0]
        self.position += len(ids)
        return out.reshape(-1, out.shape[-1])[-1].float().numpy()

    def _prefill(self, prompt: np.ndarray) -> np.ndarray:
        self.position = 0
        return self._forward(prompt)

    def run(self, prompts: list[np.ndarray], new: int) -> protocol.Run:
        if len(prompts) != 1:
            raise ValueError("the exported program holds one sequence")
        return protocol.run_stepwise(
            lambda: [int(self._prefill(prompts[0]).argmax())],
            lambda tokens: [int(self._forward(np.array(tokens)).argmax())],
            new,
        )

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        return self._prefill(prompt).copy()


if __name__ == "__main__":
    protocol.serve(ExecuTorch)
