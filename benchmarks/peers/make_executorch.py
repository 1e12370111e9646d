"""Export the random checkpoint with ExecuTorch's own exporter: XNNPACK, 8da4w in groups of 32.

python make_executorch.py CHECKPOINT OUT.pte

Every linear layer and the head are int4 with int8 dynamic activations, the embedding is int4, the cache
float32 behind ExecuTorch's own attention operator: the settings of its Llama example.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from executorch.examples.models.llama.export_llama_lib import export_llama
from executorch.extension.llm.export.config.llm_config import DtypeOverride, LlmConfig, ModelType
from tensors import bf16_tensors, interleave_heads

CONTEXT = 1024  # tokens: a prompt of 512 and what follows
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_meta_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Return the same weights as Meta's own files name and order them."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    weights = {}
    for name, bits in bf16_tensors(checkpoint):
        name = meta_name(name)
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in heads:
            bits = interleave_heads(bits, heads[module])
        weights[name] = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, folder / "consolidated.00.pth")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": True,
    }
    (folder / "params.json").write_text(json.dumps(params))


def meta_name(name: str) -> str:
    """Turn `model.layers.3.mlp.up_proj.weight` into `layers.3.feed_forward.w3.weight`."""
    if name.startswith("model.layers."):
        layer, _, module = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        return f"layers.{layer}.{NAMES[module]}.weight"
    return {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}[name]


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    config = LlmConfig()
    config.model.dtype_override = DtypeOverride.fp32
    config.model.use_kv_cache = True
    config.model.use_sdpa_with_kv_cache = True
    config.export.max_seq_length = config.export.max_context_length = CONTEXT
    config.quantization.qmode, config.quantization.group_size = "8da4w", 32
    config.quantization.embedding_quantize = "4,32"
    config.quantization.use_hqq = False  # a slower choice of codes; speed does not depend on them
    config.backend.xnnpack.enabled = config.backend.xnnpack.extended_ops = True
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        write_meta_checkpoint(checkpoint, folder)
        config.base.model_class = ModelType.llama3_2
        config.base.checkpoint = str(folder / "consolidated.00.pth")
        config.base.params = str(folder / "params.json")
        config.export.output_dir, config.export.output_name = str(folder), str(out)  # ends in ".pte"
        export_llama(config)


if __name__ == "__main__":
    main()
