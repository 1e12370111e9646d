"""The plot of training: every loss in its place, whatever was logged."""

from typing import Any
from xml.etree import ElementTree

import pytest

from llamita.train.loss_plot import loss_plot

SVG = "{http://www.w3.org/2000/svg}"


def history(steps: int, stage: int = 1) -> list[dict[str, Any]]:
    """A stage as training logs it: measured, trained, measured."""
    rows: list[dict[str, Any]] = [{"stage": stage, "step": 0, "eval_loss": 3.0}] if stage == 1 else []
    rows += [{"stage": stage, "step": i, "loss": 3.0 - i / steps, "epoch": 0.1} for i in range(1, steps + 1)]
    rows += [{"stage": stage, "step": steps, "train_runtime": 2.0}, {"stage": stage, "trained_tokens": 9}]
    rows += [{"stage": stage, "step": steps, "eval_loss": 2.0}]
    return [*rows, {"stage": stage, "step": steps, "is_end": 1, "after": stage, "eval_loss": 2.0}]


def lines_of(root: ElementTree.Element) -> list[list[tuple[float, ...]]]:
    paths = [path.attrib["d"][1:] for path in root.iter(f"{SVG}path")]
    return [[tuple(map(float, point.split(","))) for point in path.split("L")] for path in paths if path]


def dots_of(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter(f"{SVG}circle")]


def test_losses_and_measurements_share_the_axes() -> None:
    root = ElementTree.fromstring(loss_plot(history(40)))
    losses, mean = lines_of(root)
    (first, last) = dots_of(root)
    assert len(losses) == len(mean) == 40
    assert last == losses[-1]  # both 2.0 at step 40
    assert first[0] < losses[0][0]
    assert first[1] < losses[0][1] < losses[-1][1]  # the axis points down
    assert mean[20][1] == pytest.approx(losses[20][1], abs=0.11)  # of a straight line it is the line
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"step", "loss (nats a token)", "40", "2.5", "held out"} <= set(texts)


def test_stages_follow_each_other() -> None:
    root = ElementTree.fromstring(loss_plot([*history(30), *history(10, stage=2)]))
    first, second, *_ = lines_of(root)
    assert (len(first), len(second)) == (30, 10)
    assert second[0][0] > first[-1][0]
    step = first[1][0] - first[0][0]
    assert second[-1][0] - second[0][0] == pytest.approx(9 * step, abs=0.5)
    assert "stage 2" in [text.text for text in root.iter(f"{SVG}text")]
    assert [x for x, _ in dots_of(root)] == [62.0, first[-1][0], second[-1][0]]


@pytest.mark.parametrize("losses", [[], [0.0], [2.0], [2.0, 2.0], [float("nan"), 1.0], [1e-9, 1e9]])
def test_any_losses_can_be_drawn(losses: list[float]) -> None:
    rows = [{"stage": 1, "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    found = loss_plot([*rows, {"stage": 1, "trained_tokens": 5}])
    assert bool(found) == bool(losses)
    for attribute in ElementTree.fromstring(found).iter() if found else ():
        assert "nan" not in str(attribute.attrib.values())


def test_the_style_names_what_it_is_for() -> None:
    style = ElementTree.fromstring(loss_plot(history(10))).findtext(f"{SVG}style") or ""
    selectors = [rule.split("{")[0].strip() for rule in style.split("}") if rule.strip()]
    assert selectors == ["svg", ".title", ".left", ".middle", ".grid", "path", "circle"]


def test_a_run_without_held_out_examples_has_none_in_its_legend() -> None:
    rows = [row for row in history(8) if "eval_loss" not in row]
    assert "held out" not in loss_plot(rows)
    assert "each step and running mean" in loss_plot(rows)


def test_losses_of_preferences_are_left_out() -> None:
    """They are no nats a token; what examples lose behind that stage is."""
    pairs: list[dict[str, Any]] = [
        {"stage": 2, "step": step, "loss": 0.7, "rewards/margins": 0.1} for step in range(1, 21)
    ]
    pairs.append({"stage": 2, "step": 20, "eval_loss": 0.6, "eval_rewards/accuracies": 1.0})
    pairs.append({"stage": 2, "step": 0, "is_end": 1, "after": 2, "eval_loss": 1.5})
    root = ElementTree.fromstring(loss_plot([*history(20), *pairs]))
    assert len(lines_of(root)) == 2
    xs = [x for x, _ in dots_of(root)]
    assert xs == [62.0, pytest.approx((62 + 710) / 2), 710.0]
