"""The pool under load: operations from several Python threads while its size and the instruction set change.

Each program runs in a process of its own, so that a sanitizer that ends it ends no other test.
"""

import os
import subprocess
import sys

import pytest

COMMON = """
import os, threading
import numpy as np
from llamita import _native as n

rng = np.random.default_rng(0)
codes = rng.integers(-8, 8, (256, 128), dtype=np.int8)
weights = n.pack_w4([n.codes_to_packed(codes)], [np.ones((256, 4), np.float32)], 32)
inputs = rng.standard_normal((9, 128)).astype(np.float32)

def product():
    acts, out = n.Activations(9, 128), np.empty((9, 256), np.float32)
    n.quantize(inputs, acts)
    n.linear(weights, acts, out)
    return out.tobytes()

right = product()
wrong = []

def work(rounds):
    for _ in range(rounds):
        if product() != right: wrong.append(1)
"""


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", COMMON + program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_pool_changes_while_others_compute() -> None:
    program = """
others = [threading.Thread(target=work, args=(60,)) for _ in range(3)]
for thread in others: thread.start()
for i in range(60):
    n.set_threads(1 + i % 4)
    n.set_isa(n.available_isas()[i % len(n.available_isas())])
    assert 1 <= n.threads() <= 4
for thread in others: thread.join()
print(len(wrong))
"""
    assert run(program) == "0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_compute_and_change_their_pool() -> None:
    program = """
n.set_threads(3)
other = threading.Thread(target=work, args=(60,))
other.start()
for i in range(6):
    child = os.fork()
    if child == 0:
        n.set_threads(1 + i % 3)
        os._exit(product() != right)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
other.join()
print(len(wrong))
"""
    assert run(program) == "0\n"
