"""The text of docs/results/quality.md around its tables."""

from rows import LENGTH, ROWS, SAMPLES, TWINS
from tables import Cells, against_meta, page, won_back

from llamita.numerics.intervals import Interval

_TWINS = {
    "plain": "the embedded model",
    "basis": "its stressed twin *basis*",
    "pairs": "its stressed twin *pairs*",
    "both": "its twin with both stresses",
}
_HEAD = f"""# What each method loses

Made by `benchmarks/quality.py`, which says in `benchmarks/quality/rows.py` what every row is; any of them can
be run alone. The preset is `llama3.2` (int8 embedding and head, scales on the bf16 grid) but for what a row's
name says; activations are int8. The *embedded model* has 5.8 million weights; its
[stressed twins](embedded.md#the-stressed-twin) compute the same function with the outliers of large models.

- Scored text: characters 60,000 to 120,000 of TinyStories' validation split, which no calibration has seen;
  the first 60,000 served to choose defaults; that R4 joined the preset was decided on this text. The marks
  at the ends of stories are left out: the model has never read them. *WikiText*: LM Eval's word perplexity
  on WikiText-2's test split, with the first seed's model, which has learned children's stories and little
  else.
- Calibration: {SAMPLES} windows of {LENGTH} tokens of TinyStories' training split; *own text*: as many tokens
  that the float model wrote.
- The preset is what `quantize --preset llamita` does but for the windows, of which that takes 128. R1 needs a
  matrix before the tied head, which makes the model larger (1B: 1 %); all other rows have the same size.
- On the plain model every row has three seeds; on *basis* those do that learn rotations, other cells have
  one. Rows that say nothing about a twin are left out there. What has no *seeds* draws nothing.
- Means over the seeds, token by token, with 95 % intervals of the block bootstrap over the text; *seeds*: how
  many, the least and the largest mean of a single one. *against the best*: whether the row's KL differs from
  the best row's beyond noise, paired by token, the spread of seeds included where there are several.
- *s*, *MB*: seconds of one CPU and peak memory of the process (Torch included), two rows at a time on a
  shared machine: read them as orders of magnitude. Rows that share learned rotations each count what learning
  took; writing *own text* is not counted.
- `spinquant + gptq` is the recipe of Meta's released models with our implementations: KL to the float model
  as the loss, weights rounded while rotations are learned, 200 steps of one window, scales searched, and one
  sweep of coordinate descent after gptq. R3 belongs to the int8 cache, which is not used here.
"""


def render(cells: Cells) -> str:
    """The page."""
    parts = [_HEAD, *_stress(cells), *_meta(cells), page(cells, _heading)]
    return "\n".join(parts).rstrip() + "\n"


def _heading(twin: str, group_size: int) -> str:
    return f"## Groups of {group_size}, {_TWINS[twin]}"


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _stress(cells: Cells) -> list[str]:
    """How much of what the stress costs each row wins back."""
    groups = sorted({g for t, g, _ in cells if t != "plain"})
    lines = []
    for name in ROWS:
        for twin in TWINS:
            shares = [won_back(cells, twin, g, name) for g in groups] if twin != "plain" else []
            if any(shares):
                found = " | ".join(_percent(s) if s else "" for s in shares)
                lines.append(f"| {name} | {twin} | {found} |")
    if not lines:
        return []
    return [
        "## What the stress costs, won back",
        "",
        "Of the KL that searched scales alone lose on a twin beyond what they lose on the plain model. Above "
        "100 %: better than they are on the plain model.",
        "",
        "| method | twin | " + " | ".join(f"groups of {g}" for g in groups) + " |",
        "|---" * (2 + len(groups)) + "|",
        *lines,
        "",
    ]


def _meta(cells: Cells) -> list[str]:
    """The best row beside Meta's recipe."""
    lines = []
    for twin in TWINS:
        for group_size in sorted({g for t, g, _ in cells if t == twin}):
            for name, gap in against_meta(cells, twin, group_size):
                interval = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
                lines.append(f"| {twin} | {group_size} | {name} | {interval} |")
    if not lines:
        return []
    return [
        "## Beside Meta's recipe (spinquant + gptq)",
        "",
        "The best row of each table, found on the same text, and the preset's chain. Negative is better.",
        "",
        "| model | groups of | row | its KL less that of Meta's recipe |",
        "|---|---|---|---|",
        *lines,
        "",
    ]
