"""Turn the random checkpoint into GGUF files: in BF16, and quantized by llama.cpp's own quantizer.

python make_gguf.py CHECKPOINT OUT bf16|q4_0|q4_k_s     (the latter two read CHECKPOINT as a GGUF file)
"""

import json
import math
import os
import sys
from pathlib import Path

import llama_cpp as lib
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from tensors import bf16_tensors, bits_to_f32, interleave_heads

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FILE_TYPES = {"q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_s": lib.LLAMA_FTYPE_MOSTLY_Q4_K_S}


def write_bf16(checkpoint: Path, out: Path) -> None:
    """Write the same weights in GGUF, without a tokenizer: everything here works on token ids."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = GGUFWriter(out, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for name, bits in bf16_tensors(checkpoint):
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in heads:
            bits = interleave_heads(bits, heads[module])
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), bits_to_f32(bits))
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Turn `model.layers.3.mlp.up_proj.weight` into `blk.3.ffn_up.weight`."""
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, _, module = name.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{NAMES[module]}.weight"
    return {"model.embed_tokens": "token_embd.weight", "model.norm": "output_norm.weight"}[name]


def rope_factors(config: dict) -> np.ndarray:
    """Return the divisor of each rotary frequency in Llama 3's scaling: float32 (head_dim / 2,)."""
    scaling, half = config["rope_scaling"], config["head_dim"] // 2
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 1 keeps the frequency
    return (1 / (smooth + (1 - smooth) / scaling["factor"])).astype(np.float32)


def main() -> None:
    source, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "bf16":
        write_bf16(source, out)
    else:
        params = lib.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[kind]
        if status := lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
            raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
