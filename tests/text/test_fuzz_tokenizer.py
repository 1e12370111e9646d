"""150 damaged tokenizer.json: each is read and used, or refused with an InputError of one line.

They run in a process of their own, since the library prints a Rust backtrace where it panics.
"""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from places import HELPERS
from tiny import write_tokenizer

from llamita.errors import InputError
from llamita.text.tokenizer import Tokenizer

CASES = 150
MOST_SECONDS = 120  # for all of them, on a machine that is busy; they take a second
WEIRD: list[Any] = [
    None, True, 0, 1, -1, 2**31, 2**32, 2**64, 0.5, 1e308, "", "x", "a\nb", "\u2581", "<0xGG>", "é",
    "a" * 5000, [], [0], ["x"], {}, {"a": 1}, {"String": " "}, {"Regex": "("}, "Sequence", "Metaspace",
]  # fmt: skip
TEMPLATE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def sentencepiece_like() -> dict[str, Any]:
    """A small BPE in the form of Llama 2's: unknown token, bytes, a template that adds BOS."""
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab"])}
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": vocab, "merges": [["a", "b"]],
    }  # fmt: skip
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, **special} for i, t in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None, "post_processor": TEMPLATE,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; of a long one, the first entries."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [place for key in keys[:12] for place in ((value, key), *places(value[key]))]


def mutate(values: dict[str, Any], rng: random.Random) -> None:
    """One or two changes: an entry removed, made weird, renamed, or overwritten by another."""
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(places(values) or [({"": 0}, "")])
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = copy.deepcopy(rng.choice(WEIRD))
        elif action == 2 and isinstance(container, dict):
            container[rng.choice(["<zz>", "<0xGG>", "type", "id"])] = container.pop(key)
        else:
            other, name = rng.choice(places(values))
            container[key] = copy.deepcopy(other[name])


def use(directory: Path) -> str:
    """What becomes of the tokenizer; any error but InputError comes out."""
    try:
        tokenizer = Tokenizer(directory)
        ids = tokenizer.encode("ab ca\nfé<s>")
        tokenizer.decode([*ids, *range(300), 2**40], skip_special=False)
    except InputError as error:
        lines = len(str(error).splitlines())
        return "refused" if lines == 1 else f"refused in {lines} lines"  # which main does not know
    return "used"


def main(directory: Path) -> None:
    """In the process of its own: prints how many were refused and used."""
    write_tokenizer(directory)
    byte_level = json.loads((directory / "tokenizer.json").read_text()) | {"post_processor": TEMPLATE}
    (directory / "tokenizer_config.json").write_text("{}")
    counts = {"refused": 0, "used": 0}
    for case in range(CASES):
        values = copy.deepcopy(sentencepiece_like() if case % 2 else byte_level)
        mutate(values, random.Random(case))
        (directory / "tokenizer.json").write_text(json.dumps(values))
        print(case, flush=True)
        counts[use(directory)] += 1
    print(json.dumps(counts))


def test_damaged_tokenizers(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    path = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "RUST_BACKTRACE": "0", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, env=environment)
    assert done.returncode == 0, f"after {done.stdout[-40:]}: {done.stderr[-2000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert min(counts.values()) > CASES // 10, counts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
