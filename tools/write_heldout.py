"""Let the embedded BF16 model write the held-out text that ships with it: temperature 1, fixed seed.

python tools/write_heldout.py --out src/llamita/embedded/heldout.txt
"""

import argparse
from pathlib import Path

import llamita

LONGEST = 1024  # tokens of one document; most stories end by themselves long before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    llm = llamita.load(args.model)
    assert llm.config.bos_token_id is not None, "the embedded model begins every text with its BOS token"
    documents, written = [], 0
    while written < args.tokens:
        seed = args.seed * 100_000 + len(documents)
        result = llm.generate([llm.config.bos_token_id], max_tokens=LONGEST, temperature=1.0, seed=seed)
        documents.append(result.text.strip())
        written += len(result.token_ids)
    args.out.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    print(f"{len(documents)} documents, {written} tokens")


if __name__ == "__main__":
    main()
