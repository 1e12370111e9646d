"""Make the tables of docs/results/quality.md: means over seeds, intervals over tokens, verdicts on noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rows import FLOAT, META, PRESET, REAL_PRESET, ROWS, TWINS, YARDSTICK

from llamita.numerics.intervals import Interval, mean_interval, paired_difference

STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5th percentile of t, by degrees of freedom


@dataclass(frozen=True)
class Cell:
    """Hold a row at one group size on one twin: the mean over its seeds, token by token.

    Attributes:
        kl, losses, agrees: (tokens,).
        seeds: the mean KL of each seed.
        seconds: of one CPU, of quantizing without writing calibration text; the median over seeds.
        peak_bytes: of the process until it was quantized.
        wikitext: LM Eval's word perplexity, the mean over seeds; None where it was not asked for.
    """

    kl: np.ndarray
    losses: np.ndarray
    agrees: np.ndarray
    seeds: tuple[float, ...]
    seconds: float
    peak_bytes: float
    wikitext: float | None


Cells = dict[tuple[str, int, str], Cell]  # by twin, group size and row


def table(cells: Cells, twin: str, group_size: int) -> list[str]:
    """Return the lines of one table, without the rows that were not run."""
    found = {name: cells[twin, group_size, name] for name in ROWS if (twin, group_size, name) in cells}
    if YARDSTICK not in found:
        return []
    base, best = found[YARDSTICK], _best(found)
    lines = [
        "| method | perplexity | KL to BF16, nats a token | seeds | relative to round to nearest "
        "| same choice | WikiText | compared with the best | s | MB |",
        "|---" * 10 + "|",
    ]
    for name, cell in found.items():
        words = "" if cell.wikitext is None else f"{cell.wikitext:.1f}"
        perplexity = f"{np.exp(cell.losses.mean()):.3f}"
        if name == FLOAT:
            lines.append(f"| {name} | {perplexity} | 0 | | | | {words} | | | |")
            continue
        kl, share = mean_interval(cell.kl), ratio(cell.kl, base.kl)
        spread = f"{len(cell.seeds)}: {min(cell.seeds):.4f} to {max(cell.seeds):.4f}"
        verdict = "**best**" if name == best else _verdict(cell, found[best])
        interval = f"{kl.value:.4f} ± {(kl.high - kl.low) / 2:.4f}"
        lines.append(
            f"| {name} | {perplexity} | {interval} | {spread if ROWS[name].is_random else ''} "
            f"| {share.value:.2f} ({share.low:.2f} to {share.high:.2f}) | {cell.agrees.mean():.1%} "
            f"| {words} | {verdict} | {cell.seconds:.0f} | {cell.peak_bytes / 1e6:.0f} |"
        )
    return lines


def _best(found: dict[str, Cell]) -> str:
    return min((name for name in found if name != FLOAT), key=lambda name: found[name].kl.mean())


def ratio(values: np.ndarray, base: np.ndarray) -> Interval:
    """Return mean(values) / mean(base) over the same tokens, with the interval of the linearized ratio."""
    value = values.mean() / base.mean()
    around = mean_interval((values - value * base) / base.mean())
    return Interval(value, value + around.low, value + around.high)


def difference(cell: Cell, other: Cell) -> Interval:
    """Return the difference of mean KL, paired by token; several seeds widen the interval by their spread."""
    tokens = paired_difference(cell.kl, other.kl)
    several = [c for c in (cell, other) if len(c.seeds) > 1]
    variance = sum(np.var(c.seeds, ddof=1) / len(c.seeds) for c in several)
    freedom = sum(len(c.seeds) - 1 for c in several)
    spread = STUDENT[freedom] * float(variance) ** 0.5 if several else 0.0
    return Interval(
        tokens.value,
        tokens.value - np.hypot(tokens.value - tokens.low, spread),
        tokens.value + np.hypot(tokens.high - tokens.value, spread),
    )


def _verdict(cell: Cell, best: Cell) -> str:
    return "worse" if difference(cell, best).low > 0 else "within noise"


def won_back(cells: Cells, twin: str, group_size: int, name: str) -> Interval | None:
    """Return the share that a row wins back of what searched scales lose on a twin beyond the plain model."""
    keys = [(twin, group_size, "searched scales"), ("plain", group_size, "searched scales"), (twin, group_size, name)]
    if any(key not in cells for key in keys):
        return None
    stressed, plain, mended = (cells[key].kl for key in keys)
    return ratio(stressed - mended, stressed - plain)


def against_meta(cells: Cells, twin: str, group_size: int) -> list[tuple[str, Interval]]:
    """Return the best row and the preset's rows, each with its KL minus that of Meta's recipe."""
    found = {name: cell for (t, g, name), cell in cells.items() if (t, g) == (twin, group_size)}
    if META not in found:
        return []
    names = dict.fromkeys([_best(found), *(name for name in (REAL_PRESET, PRESET) if name in found)])
    return [(name, difference(found[name], found[META])) for name in names if name != META]


def page(cells: Cells, heading: Callable[[str, int], str]) -> str:
    """Return all tables, one below the other."""
    parts = []
    for twin in TWINS:
        for group_size in sorted({g for t, g, _ in cells if t == twin}):
            if lines := table(cells, twin, group_size):
                parts += [heading(twin, group_size), "", *lines, ""]
    return "\n".join(parts)
