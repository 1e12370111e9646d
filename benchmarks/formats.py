"""Export a packed model in every format and compare: the parity table of docs/reference/other-formats.md.

    python benchmarks/formats.py embedded-4bit --work DIR

`llamita export --json` makes each row; its proof runs the result in its own runtime or reader: ExecuTorch's,
transformers', our own reader of GGUF. `--llamacpp PYTHON` names a Python with llama-cpp-python, which then computes
the row of GGUF.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import llamita
from llamita.export.proof import own_tokens
from llamita.models.checkpoint import open_tensor_files

ROWS = {  # format: options, and what computes the proof
    "executorch": ((), "ExecuTorch"),
    "compressed-tensors": ((), "transformers"),
    "compressed-tensors, vLLM on Arm": (("--flavor", "vllm-cpu"), "transformers"),
    "compressed-tensors, vLLM on GPUs": (("--flavor", "vllm-gpu"), "transformers"),
    "torchao": ((), "transformers, torchao"),
    "hf": ((), "transformers"),
    "gguf": ((), "llama.cpp"),
    "meta": ((), ""),
}
NO_WAY_BACK = {"executorch": "a program", "hf": "floats: quantize it"}
_LLAMACPP = """
import sys, numpy as np
from llama_cpp import Llama
ids = np.load(sys.argv[2]).tolist()
model = Llama(model_path=sys.argv[1], logits_all=True, n_ctx=len(ids) + 8, verbose=False)
model.eval(ids)
np.save(sys.argv[3], np.array(model.scores[: len(ids)]))
"""


def export(source: str, form: str, options: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Export to a format; return the output of the command."""
    command = [sys.executable, "-m", "llamita", "export", source, "--to", form.split(",")[0], "-o", str(out),
               "--overwrite", "--json", *options]  # fmt: skip
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def in_llamacpp(python: str, source: str, out: Path, tokens: list[int] | None = None) -> dict[str, float]:
    """Compare llama.cpp and the engine on these tokens, by default those of the proof: KL, agreement, perplexities.

    Args:
        out: where `export --to gguf` has written.
    """
    llm = llamita.load(source, kv_dtype="f32")
    tokens = tokens or own_tokens(llm, llm.config.context)[0]
    np.save(out / "ids.npy", tokens)
    paths = [str(out / name) for name in ("model.gguf", "ids.npy", "logits.npy")]
    subprocess.run([python, "-c", _LLAMACPP, *paths], check=True, stderr=subprocess.DEVNULL)
    ours, theirs = (log_softmax(x) for x in (llm.logits(tokens), np.load(out / "logits.npy")))
    agrees = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    kl = float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
    here, there = (float(np.exp(-x[np.arange(len(tokens) - 1), tokens[1:]].mean())) for x in (ours, theirs))
    return {"kl": kl, "top_1": float(agrees), "perplexity": here, "perplexity_in_llamacpp": there}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def round_trip(source: str, out: Path) -> str:
    """Check whether `llamita import` gives back the tensors of the packed model, byte for byte."""
    there = out / "model.gguf" if (out / "model.gguf").exists() else out
    back = out.with_name(f"{out.name}-back")
    command = [sys.executable, "-m", "llamita", "import", str(there), "-o", str(back), "--overwrite", "--json"]
    subprocess.run(command, capture_output=True, check=True)
    return "identical" if tensors_of(Path(source)) == tensors_of(back) else "not lossless"


def tensors_of(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Return type, shape and bytes of every tensor."""
    files, where = open_tensor_files(directory)
    found = {name: files[file].tensors[name] for name, file in where.items()}
    return {n: (i.dtype, i.shape, files[where[n]].read(n).tobytes()) for n, i in found.items()}


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llamacpp", metavar="PYTHON")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print("| form | computed by | matrices equal to the bit | KL, nats a token | same top token | MB | back |")
    print("|---|---|---|---|---|---|---|")
    for name, (options, by) in ROWS.items():
        out = arguments.work / name.replace(", ", "-").replace(" ", "-")
        output = export(arguments.source, name, options, out)
        proof = output["proof"] or {key: output[key] for key in ("equal_layers", "layers") if key in output}
        if name == "gguf" and arguments.llamacpp:
            proof |= in_llamacpp(arguments.llamacpp, arguments.source, out)
        equal = f"{proof['equal_layers']} of {proof['layers']}" if "layers" in proof else "tested"
        kl = f"{proof['kl']:.5f} | {proof['top_1']:.1%}" if "kl" in proof else "| "
        shown_by = by if "kl" in proof else "not run"
        back = NO_WAY_BACK.get(name) or round_trip(arguments.source, out)
        size = f"{output['bytes'] / 1e6:,.1f}"
        print(f"| `{name}` | {shown_by} | {equal} | {kl} | {size} | {back} |", flush=True)


if __name__ == "__main__":
    main()
