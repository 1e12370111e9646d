"""The pool of threads: counts that cannot be had, forks, and how users hear of it."""

import os
import subprocess
import sys

import pytest
from programs import run_program

from llamita import _native
from llamita.errors import InputError
from llamita.system.threads import remark, use_threads

ONE_OPERATION = """
import os, threading, numpy as np
from llamita import _native as n
x, out = np.ones((512, 4096), np.float32), np.empty((512, 2048), np.float32)
def work(): n.swiglu(x, out)
"""


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_program(f"from llamita.cli import main; main({list(arguments)!r})", **variables)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_that_cannot_start_leave_the_pool_as_it_was() -> None:
    program = (
        ONE_OPERATION
        + """
import resource
n.set_threads(2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
try:
    n.set_threads(1024)
except RuntimeError as error:
    print(error)
work()
print(n.threads(), out.min() > 0)
"""
    )
    result = run_program(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("threads: expected to start 1024, got ")
    assert result.stdout.splitlines()[1] == "2 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_during_an_operation_can_compute() -> None:
    program = (
        ONE_OPERATION
        + """
n.set_threads(3)
stop = threading.Event()
def loop():
    while not stop.is_set(): work()
other = threading.Thread(target=loop)
other.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        out = np.zeros_like(out)
        work()
        os._exit(0 if n.threads() == 3 and out.min() > 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
other.join()
work()
print("done")
"""
    )
    result = run_program(program)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize("value", ["abc", "0", "-3", "2x", "5000", "99999999999999999999"])
def test_a_wrong_environment_fails_on_first_use(value: str) -> None:
    program = ONE_OPERATION + "for use in (n.threads, lambda: n.set_threads(2), work):\n"
    program += "    try: use()\n    except ValueError as error: print(error)\n"
    lines = run_program(program, LLAMITA_THREADS=value).stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("LLAMITA_THREADS: expected 1 to 1024, got ") for line in lines)


@pytest.mark.parametrize("count", [0, -1, 1025, 2**70])
def test_a_wrong_count_is_an_input_error(count: int) -> None:
    before = _native.threads()
    with pytest.raises(InputError, match=f"threads: expected 1 to 1024, got {count}"):
        use_threads(count)
    assert use_threads(None) == before


GENERATE = ("generate", "embedded", "--prompt", "Once", "--max-tokens", "1")
QUANTIZE = ("quantize", "embedded", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ((*GENERATE, "--threads", "5000"), {}),
        ((*QUANTIZE, "--threads", "5000"), {}),
        (("evaluate", "embedded", "--threads", "-1"), {}),
        (("chat", "embedded", "--threads", "0"), {}),
        (("plan", "embedded", "--threads", "2000"), {}),
        (GENERATE, {"LLAMITA_THREADS": "abc"}),
        (QUANTIZE, {"LLAMITA_THREADS": "abc"}),
        (("plan", "embedded"), {"LLAMITA_THREADS": "abc"}),
        (GENERATE, {"LLAMITA_ISA": "mmx"}),
    ],
)
def test_commands_say_it_in_one_line(arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    result = command(*arguments, **variables)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    place = "LLAMITA_ISA: expected an instruction" if "LLAMITA_ISA" in variables else "expected 1 to 1024"
    assert result.stderr.startswith("error: ")
    assert place in result.stderr or arguments[0] == "quantize"


def test_more_threads_than_cpus_are_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "usable_cpus", lambda: 2)
    assert remark(2) is None
    assert remark(3) == "threads: 3 on 2 usable CPUs will be slower than 2"


def test_a_command_remarks_on_too_many_threads() -> None:
    result = command(*GENERATE, "--threads", str(_native.usable_cpus() + 1))
    assert result.returncode == 0, result.stderr
    assert "will be slower" in result.stderr.splitlines()[0]
    assert "will be slower" not in command(*GENERATE, "--threads", "1").stderr
