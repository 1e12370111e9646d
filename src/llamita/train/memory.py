"""Estimate the memory of training from shapes alone, for `finetune --dry-run`."""

from llamita.models.config import ModelConfig
from llamita.train.recipe import Recipe, Stage

_F32, _BF16, _BYTE = 4, 2, 1  # bytes
_MOMENTS = 2  # of Adam, for each weight that is trained
_TORCH_MEMORY = 700e6  # bytes of Torch, transformers, TRL and PEFT after import
_LOGIT_COPIES = 3  # of a micro-batch: all logits, those of learned tokens, and their gradient


def expected_memory(config: ModelConfig, recipe: Recipe, on_gpu: bool, shards: int = 1) -> float:
    """Return the bytes of the largest stage, summed over what PyTorch holds.

    Args:
        on_gpu: activations are BF16, and only those between blocks are kept (gradient checkpointing).
        shards: the number of processes that divide weights, gradients and moments.
    """
    return max(_stage_memory(config, recipe, stage, on_gpu, shards) for stage in recipe.stages)


def _stage_memory(config: ModelConfig, recipe: Recipe, stage: Stage, on_gpu: bool, shards: int) -> float:
    linear = sum(rows * columns for rows, columns in config.linear_shapes().values())
    table = config.vocab_size * config.hidden_size
    weights = config.layers * linear + table * (1 if config.tied else 2)
    trained = weights if stage.train == "weights" else _adapter_weights(config, stage)
    kept = _F32 * (weights + trained + _MOMENTS * trained)
    if trained != weights:
        kept += _F32 * trained
    if stage.distill:
        kept += weights * (_BF16 if on_gpu else _F32)
    tokens = stage.micro_batch * recipe.length * (2 if stage.prefers else 1)  # both answers of a pair
    layers = 1 if on_gpu else config.layers  # layers whose inner values are in memory at the same time
    used = layers * (tokens * _activation_bytes(config, stage, on_gpu) + _rounded_bytes(linear, stage))
    used += _rounded_bytes(table, stage)
    if on_gpu:
        used += tokens * config.layers * config.hidden_size * _BF16
    models = _LOGIT_COPIES + (1 if stage.distill or stage.prefers else 0)
    logits = models * tokens * config.vocab_size * _F32
    return _TORCH_MEMORY * (not on_gpu) + kept / shards + used + logits


def _adapter_weights(config: ModelConfig, stage: Stage) -> int:
    shapes = config.linear_shapes()
    chosen = [shape for name, shape in shapes.items() if name.rpartition(".")[2] in stage.targets]
    return config.layers * stage.rank * sum(rows + columns for rows, columns in chosen)


def _rounded_bytes(weights: int, stage: Stage) -> int:
    """Return the bytes that rounded layers keep for the gradient: dequantized weights, and flags of those in range."""
    if not stage.quantized:
        return 0
    return weights * (_F32 + (_BYTE if stage.train == "weights" else 0))


def _activation_bytes(config: ModelConfig, stage: Stage, on_gpu: bool) -> int:
    """Return the bytes a token and block that the backward pass reads: inputs of layers, norms, rotations, products."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    floats = 6 * hidden + 4 * queries + 4 * keys + 4 * inner
    if stage.quantized:  # rounded inputs are kept as well as the float ones
        floats += 2 * hidden + queries + inner
    return floats * (_BF16 if on_gpu else _F32)
