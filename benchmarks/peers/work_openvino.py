"""Run OpenVINO GenAI as a contender: its own LLMPipeline, timed from outside by the tokens that it streams."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import protocol


class Stopwatch(genai.StreamerBase):
    """Notes when each token came out."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: Any) -> Any:
        now = time.perf_counter()
        self.times += [now] * (len(token) if isinstance(token, list) else 1)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino:
    """A pipeline that prefills and decodes in one call; the split is where the first token came out."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.model = Path(options["model"])
        self.properties = {
            "INFERENCE_NUM_THREADS": options["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "ATTENTION_BACKEND": options["attention"],
            **options.get("properties", {}),
        }
        self.pipeline = genai.LLMPipeline(self.model, "CPU", **self.properties)
        self.about = {
            "version": f"openvino-genai {version('openvino-genai')}, openvino {version('openvino')}",
            "settings": {name: str(value) for name, value in self.properties.items()},
        }

    def run(self, prompts: list[np.ndarray], new: int) -> protocol.Run:
        ids = np.stack(prompts).astype(np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=1 + new, ignore_eos=True, do_sample=False)
        watch = Stopwatch() if len(prompts) == 1 else None  # the pipeline streams single sequences only
        began = time.perf_counter()
        results = self.pipeline.generate(inputs, config, watch) if watch else self.pipeline.generate(inputs, config)
        ended = time.perf_counter()
        if watch:
            first, last = watch.times[0], watch.times[-1]
        else:
            first, last = began + results.perf_metrics.get_ttft().mean / 1e3, ended
        return protocol.Run(first - began, last - first, [list(tokens) for tokens in results.tokens])

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        """Compute logits from the same files with the plain runtime: the pipeline does not show its own."""
        request = ov.Core().compile_model(self.model / "openvino_model.xml", "CPU").create_infer_request()
        tokens = len(prompt)
        out = request.infer(
            {
                "input_ids": prompt[None].astype(np.int64),
                "attention_mask": np.ones((1, tokens), np.int64),
                "position_ids": np.arange(tokens)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return out[0][0, -1].copy()


if __name__ == "__main__":
    protocol.serve(OpenVino)
