"""Check fine-tuning by several processes: the losses of one process, whoever saved, whoever resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from command import assert_nothing_is_left, one_line, run
from jsonl import write_jsonl
from tiny import make_checkpoint

from llamita.models.checkpoint import Checkpoint

torch = pytest.importorskip("torch", reason="training is on the Torch side")
pytest.importorskip("trl", reason="training is on the Torch side")

from safetensors.torch import load_file  # noqa: E402

from llamita.train import finetune, trainer  # noqa: E402
from llamita.train.batches import StepRows, count_parts, own_parts  # noqa: E402
from llamita.train.load import load_float  # noqa: E402

SMALL = ("--set", "length=64", "--set", "held_out=0.3", "--set", "batch=4", "--set", "micro_batch=1",
         "--set", "learning_rate=1e-3", "--set", "save_every=2", "--set", "evaluate_every=3")  # fmt: skip
SLOWEST = 60  # seconds until a run whose process was killed has ended


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny base model."""
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write fifty examples of many lengths: rows that two processes cannot share evenly."""
    lines = [{"prompt": f"say {i} " * (1 + i % 3), "completion": f"{i} " * (1 + i % 5)} for i in range(50)]
    return write_jsonl(tmp_path / "data.jsonl", lines)


def started(count: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a program, or a module and its arguments, under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*torchrun, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def finished(torchrun: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit code, stdout and stderr of all processes."""
    try:
        out, err = torchrun.communicate(timeout=300)
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    return torchrun.returncode, out, err


def history(directory: Path) -> list[dict[str, Any]]:
    """Return what was logged."""
    return json.loads((directory / "llamita_training.json").read_text("utf-8"))["history"]


def assert_same_losses(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    """Compare step by step, trained and held out."""
    assert len(found) == len(expected)
    count = 0
    for one, other in zip(found, expected, strict=True):
        assert one.get("step") == other.get("step")
        for name in {"loss", "eval_loss"} & other.keys():
            assert one[name] == pytest.approx(other[name], rel=rel), (name, other)
            count += 1
    assert count > 0


def worker(torchrun: subprocess.Popen[str], rank: int) -> int:
    """Return the id of the process with this rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_bytes().decode().split("\0"):
            return int(child)
    raise AssertionError(children)


def trained_tokens(out: Path) -> int:
    """Return the trained tokens of the last run that made OUT."""
    return sum(row.get("trained_tokens", 0) for row in history(out))


@pytest.mark.parametrize("sharding", [(), pytest.param(("--shard",), marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns(
    model: Path, data: Path, tmp_path: Path, sharding: tuple[str, ...]
) -> None:
    options = ("--method", "qat-lora", *SMALL, "--set", "1.steps=5", "--set", "2.steps=1", "--json")
    assert run("finetune", model, "--data", data, "-o", tmp_path / "one", *options) == 0
    two = ("finetune", model, "--data", data, "-o", tmp_path / "two", *options, *sharding)
    code, out, err = finished(started(2, "-m", "llamita", *two))
    assert code == 0, err
    assert len(json.loads(out)["scores"]) == 3  # only the first process prints
    assert_nothing_is_left(tmp_path, "model", "data.jsonl", "one", "one-adapter", "two", "two-adapter")
    logged = [history(tmp_path / name) for name in ("two-adapter", "one-adapter")]
    stages = [[[row for row in rows if row["stage"] == stage] for rows in logged] for stage in (1, 2)]
    assert_same_losses(*stages[0], rel=1e-5)
    assert_same_losses(*stages[1], rel=1e-2)  # an activation that rounds the other way shows at once
    assert trained_tokens(tmp_path / "two-adapter") >= trained_tokens(tmp_path / "one-adapter") > 0


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [(), ("--shard",)])
def test_one_process_goes_on_where_two_were_killed(
    model: Path, data: Path, tmp_path: Path, sharding: tuple[str, ...]
) -> None:
    options = ("--method", "full", *SMALL, "--set", "steps=40")
    assert run("finetune", model, "--data", data, "-o", tmp_path / "whole", *options) == 0
    out, kept = tmp_path / "out", tmp_path / ".out.work" / "stage-1"
    torchrun = started(2, "-m", "llamita", "finetune", model, "--data", data, "-o", out, *options, *sharding)
    while torchrun.poll() is None and not (kept / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.01)
    os.kill(worker(torchrun, 1), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = finished(torchrun)
    assert code != 0
    assert time.monotonic() - began < SLOWEST
    assert not out.exists(), err
    assert kept.exists()
    assert run("finetune", model, "--data", data, "-o", out, *options) == 0
    assert_same_losses(history(out), history(tmp_path / "whole"), rel=1e-5)
    assert 0 < trained_tokens(out) < trained_tokens(tmp_path / "whole")  # the rest, not all
    assert not kept.exists()


@pytest.mark.slow
def test_two_processes_with_parts_go_on_where_one_was_stopped(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "qat", *SMALL, "--set", "steps=6", "--set", "start=gptq", "--json")
    assert run("finetune", model, "--data", data, "-o", tmp_path / "whole", *options) == 0

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del self, args, control, kwargs
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ProgressReporter, "on_step_end", stop)
        assert run("finetune", model, "--data", data, "-o", tmp_path / "out", *options) == 130
    two = ("finetune", model, "--data", data, "-o", tmp_path / "out", *options, "--shard")
    code, _, err = finished(started(2, "-m", "llamita", *two))
    assert code == 0, err
    assert err.count("resuming an earlier run") == 1
    records = [json.loads((tmp_path / name / "llamita.json").read_text("utf-8")) for name in ("out", "whole")]
    found, expected = (record["settings"]["losses"] for record in records)
    assert found == pytest.approx(expected, rel=1e-5)  # the codes that one process chose were kept
    assert len(found) == 2


def test_a_mistake_is_printed_once(model: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = finished(
        started(
            2, "-m", "llamita", "finetune", model, "--data", data, "-o", tmp_path / "out", *SMALL, "--set", "rank=0"
        )
    )
    assert code != 0
    assert out == ""
    assert err.count("rank: expected a whole number of at least 1, got 0") == 1


PARTS = """
import copy
import sys
from pathlib import Path
import torch
from llamita.system import collectives
from llamita.models.checkpoint import Checkpoint
from llamita.train.load import load_float
from llamita.train.sharding import keep, optimizer_state, restore, restore_optimizer, shard

collectives.join(60)
models = [load_float(Checkpoint(Path(sys.argv[1]))) for _ in range(2)]
with torch.no_grad():
    for parameter in models[1].parameters():
        parameter.zero_()
optimizers = []
for model in models:
    shard(model, torch.device("cpu"))
    optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.01))
held = sum(p.to_local().numel() for p in models[0].parameters())
assert held == sum(p.numel() for p in models[0].parameters()) / 2, held
keep(models[0], Path(sys.argv[2]))
collectives.wait()
restore(models[1], Path(sys.argv[2]))
ids = torch.arange(12)[None]
for _ in range(2):
    models[0](input_ids=ids, labels=ids).loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
state = [optimizer_state(optimizers[0])]
torch.distributed.broadcast_object_list(state)
keep(models[0], Path(sys.argv[2]))
collectives.wait()
restore(models[1], Path(sys.argv[2]))
restore_optimizer(optimizers[1], copy.deepcopy(state[0]))
losses = []
for model, optimizer in zip(models, optimizers, strict=True):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    losses.append(model(input_ids=ids, labels=ids).loss.item())
assert losses[0] == losses[1], losses
"""


@pytest.mark.slow
def test_each_process_holds_half_and_what_is_kept_is_whole(model: Path, tmp_path: Path) -> None:
    """Weights and Adam's moments, kept and restored, give the same next step."""
    (tmp_path / "parts.py").write_text(PARTS)
    kept = tmp_path / "kept.safetensors"
    code, _, err = finished(started(2, tmp_path / "parts.py", model, kept))
    assert code == 0, err
    state = load_file(kept)
    whole = load_float(Checkpoint(model))
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    finetune.restore(whole, kept)
    assert all(torch.equal(parameter, state[name]) for name, parameter in whole.named_parameters())


@pytest.fixture
def third_of_three(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set the environment that torchrun gives the last of three processes."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "batch=2", "--set", "micro_batch=1"),
         "batch: expected a row for each of 3 processes, got 2; try fewer processes"),
        (("--method", "qat", "--set", "start=gptq+tune"),
         "start: expected a single process for tune, got 3; try --set start=gptq"),
        (("--recipe", "llama3.2-qat-lora", "--preferences", "pairs.jsonl"),
         "--preferences: expected a single process, got 3; try without torchrun"),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: Any, third_of_three: Any, options: tuple[str, ...], message: str
) -> None:
    assert run("finetune", model, "--data", data, "-o", tmp_path / "out", *options) == 2
    assert message in one_line(capsys)


def test_parts_need_several_processes_and_no_accelerate(
    model: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", data, "-o", tmp_path / "out")
    assert run("finetune", model, *options, "--shard") == 2
    assert "--shard: expected several processes, got one; try torchrun" in one_line(capsys)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run("finetune", model, *options) == 2
    assert "ACCELERATE_USE_FSDP: expected accelerate to do nothing but start processes" in one_line(capsys)


def test_processes_share_the_rows_of_each_step(third_of_three: pytest.MonkeyPatch) -> None:
    """Seventeen rows in steps of seven: what one process reads in a step, three read together."""

    def read(world: int, rank: int) -> list[list[int]]:
        third_of_three.setenv("WORLD_SIZE", str(world))
        third_of_three.setenv("RANK", str(rank))
        rows = StepRows(17, 7, 2, seed=5)
        rows.set_epoch(1)
        micro = list(rows)
        assert len(micro) == len(rows)
        assert all(0 < len(batch) <= 2 for batch in micro)
        whole = count_parts(7, 2)
        bounds = [0, whole, 2 * whole, len(micro)]
        return [sorted(chain(*micro[a:b])) for a, b in pairwise(bounds)]

    alone, together = read(1, 0), [read(3, rank) for rank in range(3)]
    assert sorted(chain(*alone)) == list(range(17))
    for step, rows in enumerate(alone):
        assert sorted(row for one in together for row in one[step] if row < 17) == rows
    parts = []
    for rank in range(3):
        third_of_three.setenv("RANK", str(rank))
        parts.append(own_parts(range(4), 1, blank=9))
    assert {len(part) for part in parts} == {2}
    assert sorted(row for part in parts for batch in part for row in batch) == [0, 1, 2, 3, 9, 9]
