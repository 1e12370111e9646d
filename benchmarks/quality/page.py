"""Write the text of docs/results/quality.md around its tables."""

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

`benchmarks/quality.py` makes this page, and each of its rows can be run alone.
`benchmarks/quality/rows.py` defines the rows.
The scheme is that of `llama3.2`: int8 embedding and head, scales on the bf16 grid.
The name of a row or table says where it differs.
Activations are int8.
The *embedded model* has 5.8 million weights.
It has [stressed twins](embedded-model.md#the-stressed-twin).
They compute the same function with the outliers of large models.

**Scored text**
- The models are scored on characters 60,000 to 120,000 of TinyStories' validation split.
  No calibration has seen this text.
- Defaults were chosen on the first 60,000 characters.
  One choice was made on the scored text itself: that R4 is part of the preset.
- The marks at the ends of stories are left out, because the model has never read them.
- *WikiText* is LM Eval's word perplexity on WikiText-2's test split, with the model of the first seed.
  The embedded model has learned children's stories and little else.

**Calibration**
- The calibration text is {SAMPLES} windows of {LENGTH} tokens of TinyStories' training split.
- *own text*: as many tokens, written by the float model.

**Rows**
- *preset llamita* does what `quantize --preset llamita` does, except that the command takes 128 windows.
- R1 needs a matrix before the tied head, which makes the model larger (1B: 1 %).
  All other rows have the same size.
- `spinquant + gptq` is the recipe of Meta's released models, with our implementations.
  The loss is the KL divergence from the float model, and weights are rounded while rotations are learned.
  There are 200 steps of one window; scales are searched.
  One sweep of coordinate descent follows gptq.
  R3 belongs to the int8 cache, which is not used here.

**Seeds**
- On the plain model every row that draws something has three seeds.
- On *basis* the rows that learn R1 and R2 together have three seeds; all other cells have one.
- Rows that say nothing about a twin are left out there.
- Rows without *seeds* draw nothing.

**Columns**
- Values are means over the seeds, token by token.
  Their 95 % intervals come from the block bootstrap over the text.
- *seeds*: how many, then the least and the largest mean of a single one.
- *relative to round to nearest*: KL divided by that of torchao's round to nearest.
- *same choice*: how often the likeliest token is that of the float model.
- *compared with the best*: whether the row's KL differs from the best row's by more than noise.
  The test is paired by token and includes the spread of seeds where there are several.
- *s*, *MB*: seconds of one CPU, and peak memory of the process (Torch included).
  Two rows ran at a time on a shared machine, so read them as orders of magnitude.
  Rows that share learned rotations each count the time of learning; writing *own text* is not counted.
"""


def render(cells: Cells) -> str:
    """Return the page."""
    parts = [_HEAD, *_stress(cells), *_meta(cells), page(cells, _heading)]
    return "\n".join(parts).rstrip() + "\n"


def _heading(twin: str, group_size: int) -> str:
    return f"## Groups of {group_size}, {_TWINS[twin]}"


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _stress(cells: Cells) -> list[str]:
    """Return the table of how much of the cost of the stress each row wins back."""
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
        "With searched scales alone, a twin loses more KL than the plain model.",
        "The table shows how much of this difference each method wins back.",
        "Above 100 %, the method loses less on the twin than searched scales lose on the plain model.",
        "",
        "| method | twin | " + " | ".join(f"groups of {g}" for g in groups) + " |",
        "|---" * (2 + len(groups)) + "|",
        *lines,
        "",
    ]


def _meta(cells: Cells) -> list[str]:
    """Return the table that compares the best rows with Meta's recipe."""
    lines = []
    for twin in TWINS:
        for group_size in sorted({g for t, g, _ in cells if t == twin}):
            for name, gap in against_meta(cells, twin, group_size):
                interval = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
                lines.append(f"| {twin} | {group_size} | {name} | {interval} |")
    if not lines:
        return []
    return [
        "## Compared with Meta's recipe (spinquant + gptq)",
        "",
        "These are the best row of each table, chosen on the same text, and the rows of the preset's chain.",
        "Negative is better.",
        "",
        "| model | groups of | row | its KL minus that of Meta's recipe |",
        "|---|---|---|---|",
        *lines,
        "",
    ]
