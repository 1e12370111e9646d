"""Make the stressed twin: exactly the embedded model's function, with the outliers of large models.

    python tools/stress_embedded.py --model src/llamita/embedded --out build/stressed --parts basis,pairs

*basis*: the norms' weights are folded into the layers that read them, then the residual stream is
rotated into its principal components, so that a few channels carry most of it. A rotation undoes it;
folding the norms does not. Head and embedding come apart, because the head takes the final norm's weight.
*pairs*: a few rows of v_proj grow and the columns of o_proj that read them shrink, likewise up_proj and
down_proj. Equalizing the pairs undoes it; a rotation makes it worse.
All products in float64, stored in FP32.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

PAIR_SEED = 7
PAIR_FRACTION = 0.03  # of the channels; large models show outliers in a few channels of a hundred
PAIR_SCALE = 16.0
SAMPLE_TOKENS, SAMPLE_WINDOW = 4096, 1024  # of text for the principal components


def fold_norms(model: LlamaForCausalLM) -> None:
    """Multiply each RMSNorm's weight into the layers that read it, and untie the head."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        model.config.tie_word_embeddings = False
    readers = [(model.model.norm, [model.lm_head])]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        readers.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    for norm, linears in readers:
        for linear in linears:
            linear.weight.data *= norm.weight.data  # (outputs, hidden) * (hidden,)
        norm.weight.data.fill_(1.0)


def residual_covariance(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the second moments (hidden, hidden) of what the norms read, each token scaled to unit mean square."""
    hidden = model.config.hidden_size
    total = torch.zeros(hidden, hidden, dtype=torch.float64)

    def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, hidden).double()
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        total.add_(x.T @ x)

    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return total


def rotate_residual(model: LlamaForCausalLM, rotation: torch.Tensor) -> None:
    """Rotate the residual stream x to x @ rotation; the norms' weights must be 1."""
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data @ rotation
    model.lm_head.weight.data = model.lm_head.weight.data @ rotation
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.data = reader.weight.data @ rotation
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.data = rotation.T @ writer.weight.data


def scale_pairs(model: LlamaForCausalLM) -> None:
    """Scale a few channels between v_proj and o_proj, and between up_proj and down_proj."""
    generator = torch.Generator().manual_seed(PAIR_SEED)
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads

    def scales(channels: int) -> torch.Tensor:
        chosen = torch.rand(channels, generator=generator) < PAIR_FRACTION
        return torch.where(chosen, PAIR_SCALE, 1.0).double()

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        up = scales(attention.v_proj.out_features)  # (kv_heads * head_dim,)
        attention.v_proj.weight.data *= up[:, None]
        # Each kv head serves `groups` query heads, whose columns of o_proj are next to each other.
        shared = up.view(config.num_key_value_heads, 1, -1).expand(-1, groups, -1).reshape(-1)
        attention.o_proj.weight.data /= shared
        up = scales(mlp.up_proj.out_features)
        mlp.up_proj.weight.data *= up[:, None]
        mlp.down_proj.weight.data /= up


def calibration_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the beginning of a text as (windows, tokens)."""
    tokens = tokenizer(text[: 8 * SAMPLE_TOKENS], return_tensors="pt").input_ids[:, :SAMPLE_TOKENS]
    window = min(tokens.shape[1], SAMPLE_WINDOW)
    return tokens[:, : tokens.shape[1] // window * window].reshape(-1, window)


def stress(model: LlamaForCausalLM, tokens: torch.Tensor, parts: set[str]) -> LlamaForCausalLM:
    """Return the twin with the given parts ("basis", "pairs"); `model` is changed in place."""
    model.double()
    if "basis" in parts:
        fold_norms(model)
        covariance = residual_covariance(model, tokens)
        rotate_residual(model, torch.linalg.eigh(covariance).eigenvectors)
    if "pairs" in parts:
        scale_pairs(model)
    return model.float()


def save_twin(model: Path, parts: set[str], out: Path, text: Path | None = None, fold: bool = False) -> None:
    """Write the twin of the model in the directory `model`, its norms folded at the end if asked for."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = calibration_tokens(tokenizer, (text or model / "heldout.txt").read_text("utf-8"))
    twin = stress(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokens, parts)
    if fold:
        fold_norms(twin)
    twin.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="text whose activations give the principal components")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="basis,pairs")
    args = parser.parse_args()
    parts = set(args.parts.split(","))
    if not parts <= {"basis", "pairs"}:
        parser.error(f"--parts: expected basis, pairs or both, got {args.parts}")
    save_twin(args.model, parts, args.out, args.text)


if __name__ == "__main__":
    main()
