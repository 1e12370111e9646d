"""Train the embedded model: a small Llama, and its tokenizer, from plain text.

    python tools/train_embedded.py --text DIR --out build/embedded --steps 2700

`DIR` holds tinystories_train.txt, tinystories_valid.txt, children.txt and general.txt. The seed and `--steps` decide
the result. The run saves itself every few minutes and resumes where it stopped.
Recipe: Muon for the matrices (Jordan et al., 2024), AdamW for the rest; a constant learning rate, then
a linear decay over the last sixth; windows of 256 tokens, the last 5 % of the steps with 2,048.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096
CONTEXT = 2048
SHORT_WINDOW = 256
BOOK_PASSAGE = 6000  # characters; a passage of a book is one document of about 1,500 tokens
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
BOS, EOS = 0, 1


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, besides the texts."""

    steps: int = 2700
    seed: int = 1
    batch_tokens: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.05
    warmup_steps: int = 100
    decay_fraction: float = 1 / 6
    long_fraction: float = 0.05
    mixture: tuple[float, ...] = (0.5, 0.4, 0.1)  # TinyStories, children's books, general


def split_documents(text: str) -> tuple[list[str], list[str]]:
    """Return documents for training, and every 50th one held out."""
    paragraphs = text.split("\n\n")
    documents, current = [], ""
    for paragraph in paragraphs:
        current += paragraph + "\n\n"
        if len(current) > BOOK_PASSAGE:
            documents.append(current.strip())
            current = ""
    documents.append(current.strip())
    return [d for i, d in enumerate(documents) if i % 50], documents[::50]


def read_corpus(folder: Path) -> tuple[list[list[str]], dict[str, list[str]]]:
    """Return training documents by source, and held-out documents by source."""

    def stories(name: str) -> list[str]:
        return [s.strip() for s in (folder / name).read_text("utf-8").split("<|endoftext|>") if s.strip()]

    children, children_heldout = split_documents((folder / "children.txt").read_text("utf-8"))
    general, _ = split_documents((folder / "general.txt").read_text("utf-8"))
    heldout = {"tinystories": stories("tinystories_valid.txt"), "children": children_heldout}
    return [stories("tinystories_train.txt"), children, general], heldout


def train_tokenizer(documents: list[str], out: Path) -> Tokenizer:
    """Train a byte-level BPE of 4,096 tokens, in Hugging Face's format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    # The model is a plain language model: its chat template only joins the turns.
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[BOS],
                "eos_token": SPECIAL[EOS],
                "model_max_length": CONTEXT,
                "clean_up_tokenization_spaces": False,
                "chat_template": template,
            },
            indent=2,
        )
        + "\n"
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Return one stream of token ids: every document between its BOS and EOS."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        stream += [*encoding.ids, EOS]
    return np.array(stream, dtype=np.int64)


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    decay_start = int(recipe.steps * (1 - recipe.decay_fraction))
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if step < decay_start:
        return 1.0
    return max(0.02, (recipe.steps - step) / (recipe.steps - decay_start))


def sample_batch(streams: list[np.ndarray], recipe: Recipe, step: int) -> torch.Tensor:
    """Draw windows at random; only seed and step decide them, so that a run can resume."""
    rng = np.random.default_rng((recipe.seed, step))
    is_long = step >= recipe.steps * (1 - recipe.long_fraction)
    window = CONTEXT if is_long else SHORT_WINDOW
    rows = []
    for _ in range(recipe.batch_tokens // window):
        stream = streams[rng.choice(len(streams), p=recipe.mixture)]
        start = rng.integers(0, len(stream) - window - 1)
        rows.append(stream[start : start + window + 1])
    return torch.from_numpy(np.stack(rows))


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: np.ndarray, window: int, windows: int = 24) -> float:
    """Return the mean loss in nats per token over the first non-overlapping windows of a held-out stream."""
    count = min(windows, (len(stream) - 1) // window)
    rows = [stream[i * window : (i + 1) * window + 1] for i in range(count)]
    losses = [loss_of(model, torch.from_numpy(row)[None]).item() for row in rows]
    return float(np.mean(losses))


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: LlamaForCausalLM, streams: list[np.ndarray], heldout: dict[str, np.ndarray], recipe: Recipe, state_file: Path
) -> list[dict[str, float]]:
    """Run the recipe from the saved state, if there is one; returns the log of validation losses."""
    optimizers = make_optimizers(model, recipe)
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]
    first, log = 0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log = state["step"], state["log"]
    started = time.monotonic()
    for step in range(first, recipe.steps):
        groups = [group for o in optimizers for group in o.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * learning_rate_factor(step, recipe)
        loss = loss_of(model, sample_batch(streams, recipe, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            entry = {"step": step + 1, "train": loss.item()}
            entry |= {name: validation_loss(model, s, SHORT_WINDOW) for name, s in heldout.items()}
            log.append(entry)
            speed = (step + 1 - first) * recipe.batch_tokens / (time.monotonic() - started)
            print(json.dumps(entry), f"{speed:.0f} tok/s", flush=True)
            partial = state_file.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "log": log,
                },
                partial,
            )
            partial.replace(state_file)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, seed=args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    documents, heldout_documents = read_corpus(args.text)
    # The tokenizer sees what the model mostly sees: the stories, three times, and the children's books.
    tokenizer = train_tokenizer(documents[0] * 3 + documents[1], args.out)
    streams = [encode(tokenizer, source) for source in documents]
    heldout = {name: encode(tokenizer, source) for name, source in heldout_documents.items()}
    print("tokens:", [len(s) for s in streams], {n: len(s) for n, s in heldout.items()}, flush=True)
    model = make_model(recipe.seed)
    log = train(model, streams, heldout, recipe, args.out / "state.pt")
    model.to(torch.bfloat16).save_pretrained(args.out)
    final = {
        name: {f"loss_{window}": round(validation_loss(model, stream, window), 4) for window in (SHORT_WINDOW, CONTEXT)}
        for name, stream in heldout.items()
    }
    record = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "validation": final,
        "initial_loss": round(math.log(VOCABULARY), 4),
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(final))


if __name__ == "__main__":
    main()
