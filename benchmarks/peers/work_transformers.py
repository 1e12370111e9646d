"""Run transformers on PyTorch as a contender: eager mode, SDPA attention, its own caches."""

from typing import Any

import numpy as np
import protocol
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    """The reference implementation, driven token by token as `generate` does it."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        dtype = getattr(torch, options["dtype"])
        model = AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval()
        self.cache: Any = None
        self.about = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "settings": {
                "threads": torch.get_num_threads(),
                "dtype": options["dtype"],
                "attention": "sdpa",
                "cache": "DynamicCache",
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "onednn": torch.backends.mkldnn.is_available(),
            },
        }

    @torch.inference_mode()
    def _forward(self, ids: np.ndarray) -> torch.Tensor:
        """Return logits (sequences, vocab) after the last of the ids (sequences, tokens)."""
        out = self.model(
            torch.from_numpy(ids.astype(np.int64)), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]

    def run(self, prompts: list[np.ndarray], new: int) -> protocol.Run:
        self.cache = DynamicCache(config=self.model.config)
        return protocol.run_stepwise(
            lambda: self._forward(np.stack(prompts)).argmax(dim=-1).tolist(),
            lambda tokens: self._forward(np.array(tokens)[:, None]).argmax(dim=-1).tolist(),
            new,
        )

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(prompt[None])[0].float().numpy()


if __name__ == "__main__":
    protocol.serve(Transformers)
