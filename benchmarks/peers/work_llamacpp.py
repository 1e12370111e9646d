"""Run llama.cpp as a contender, through the low-level binding: the calls of llama-bench, token by token."""

import ctypes
import os
from typing import Any

import llama_cpp as lib
import numpy as np
import protocol

MICRO_BATCH = 512  # n_batch and n_ubatch: the library's default for the latter, and the prompt's length
CONTEXT_MULTIPLE = 256  # the library rounds a context to it


class LlamaCpp:
    """A model, and one context for each number and length of sequences."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(os.fsencode(options["model"]), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp: cannot load {options['model']}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Any] = {}
        self.context: Any = None
        self.lengths: list[int] = []
        self.about = {
            "version": f"llama-cpp-python {lib.__version__}",
            "settings": {
                "threads": options["threads"],
                "micro_batch": MICRO_BATCH,
                "flash_attention": options["flash"],
                "kv_dtype": "f16",
                "system": lib.llama_print_system_info().decode(),
            },
        }

    def _use_context(self, sequences: int, tokens: int) -> None:
        """Use an empty context for this number and length of sequences."""
        tokens += -tokens % CONTEXT_MULTIPLE
        if (sequences, tokens) not in self.contexts:
            for old in self.contexts.values():
                lib.llama_free(old)
            self.contexts.clear()
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = tokens * sequences, sequences
            params.n_batch = params.n_ubatch = MICRO_BATCH
            params.n_threads = params.n_threads_batch = self.options["threads"]
            params.flash_attn_type = (
                lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.options["flash"] else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            params.no_perf = True
            self.contexts[sequences, tokens] = lib.llama_init_from_model(self.model, params)
        self.context = self.contexts[sequences, tokens]
        if not self.context:
            raise RuntimeError("llama.cpp: cannot make a context")
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        self.lengths = [0] * sequences

    def _decode(self, tokens: list[tuple[int, int]], wanted: set[int]) -> None:
        """Take in (sequence, token) pairs; return logits for the places in the list that are wanted."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (sequence, token) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.lengths[sequence]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
            self.lengths[sequence] += 1
        status = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}")

    def _logits(self, row: int) -> np.ndarray:
        pointer = lib.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def _prefill(self, sequence: int, prompt: np.ndarray) -> np.ndarray:
        ids = prompt.tolist()
        for at in range(0, len(ids), MICRO_BATCH):
            part = [(sequence, token) for token in ids[at : at + MICRO_BATCH]]
            last = len(part) - 1
            self._decode(part, {last} if at + MICRO_BATCH >= len(ids) else set())
        return self._logits(last)

    def run(self, prompts: list[np.ndarray], new: int) -> protocol.Run:
        self._use_context(len(prompts), max(map(len, prompts)) + new)
        return protocol.run_stepwise(lambda: self._start(prompts), self._step, new)

    def _start(self, prompts: list[np.ndarray]) -> list[int]:
        return [int(self._prefill(i, prompt).argmax()) for i, prompt in enumerate(prompts)]

    def _step(self, tokens: list[int]) -> list[int]:
        self._decode(list(enumerate(tokens)), set(range(len(tokens))))
        return [int(self._logits(i).argmax()) for i in range(len(tokens))]

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        self._use_context(1, len(prompt))
        return self._prefill(0, prompt).copy()


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
