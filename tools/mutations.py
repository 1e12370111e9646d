"""Break kernels and numerics by hand, one line at a time, and see the suite fail.

    python tools/mutations.py                # all; about a minute each
    python tools/mutations.py --only 3 7     # some

It works on a copy of the tree: the copy is changed, built and tested, then restored. It exits with 1 if a mutation
survives. A suite that cannot fail proves nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VNNI = "native/kernels/avx512.inc"

# File, a text that occurs in it exactly once, its replacement, and what that breaks.
# ruff: noqa: E501  the lines of this table are the code that they quote
MUTATIONS = [
    (VNNI, "const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);",
     "const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low);", "decode: high nibbles of rows 16-31"),
    (VNNI, "_mm512_set1_epi32(start[i * a.groups])", "_mm512_set1_epi32(start[0])", "prefill: a token's own offset"),
    ("native/kernels/tiles.inc", "_mm512_set1_epi32(first[i * start_stride])", "_mm512_set1_epi32(first[0])",
     "AMX: a token's own offset"),
    ("native/kernels/tiles.inc", "drain<S>(dots[g % 2]", "drain<S>(dots[(g + 1) % 2]", "AMX: the sums of another group"),
    ("native/ops.cpp", "w4 ? 8 : 128", "w4 ? 8 : 127", "int8 tables: the weights' offset"),
    ("native/pack.cpp", "colsum += static_cast<double>(scale) *", "colsum += 1.001 * static_cast<double>(scale) *",
     "int4: the zero point's correction, by a thousandth"),
    ("native/kernels/attention.inc", "limit = a.start + token + 1, left", "limit = a.start + token + 2, left",
     "attention: a token sees the next one"),
    ("native/kernels/attention.inc", "lowest = limit > a.window ? limit - a.window : 0, below", "lowest = limit > a.window ? limit - a.window - 1 : 0, below",
     "attention: a window is a key wider"),
    ("native/kernels/attention.inc", "load(sums + r * stride + d + i * kLanes) * set1(correction[r])",
     "load(sums + r * stride + d + i * kLanes) * set1(correction[r] < 0.0f ? 0.0f : 1.0f)",
     "attention: earlier blocks are not scaled to the new maximum"),
    ("native/kernels/attention_i8.inc", "minus = set1(-128.0f) - load_i8(", "minus = set1(-128.0f) + load_i8(",
     "int8 keys: the sign of the zero point"),
    ("native/kernels/attention_i8.inc", "t.has_fine |= t.is_fine[r];", "t.has_fine = t.is_fine[r];",
     "int8 attention: low digits of other rows are left out"),
    ("native/kernels/panels.inc", "unpacked_tile<T>(a, part, t, acc + t * kPanelRows);", "unpacked_tile<T>(a, part, t, acc);",
     "prefill: the tiles' sums in one place"),
    ("native/pack.cpp", "r / kLanes * w.outputs() + output", "(1 - r / kLanes) * w.outputs() + output",
     "gated int4: gates and factors change places"),
    ("native/kernels/hadamard.inc", "v[i + H] = a - b;", "v[i + H] = b - a;", "Hadamard transform: a butterfly's sign"),
    ("native/kernels/rounding.inc", "best[i] > best[at]", "best[i] < best[at]", "scale search: the tie"),
    ("native/kernels/float_kernels.inc", "clamp(-128.0f - __builtin_rintf(mn / scale), -128.0f, 127.0f)",
     "clamp(-127.0f - __builtin_rintf(mn / scale), -128.0f, 127.0f)", "activations: the zero point"),
    ("native/cache.cpp", "out[i + half] = high * cos[i] + low * sin[i];",
     "out[i + half] = high * cos[i] - low * sin[i];", "rotary embedding: a sign"),
    ("src/llamita/numerics/affine.py", "largest / np.float32((qmax - qmin) / 2)", "largest / np.float32(qmax)",
     "torchao's scale: 7 for 7.5"),
    ("src/llamita/engine/rope.py", "(turns - np.float32(low)) / np.float32(high - low)",
     "(turns - np.float32(low)) / np.float32(high)", "Llama 3.1: the blend of frequencies"),
    ("src/llamita/engine/sequence.py", "if answer.finish_reason or not is_hit:", "if answer.finish_reason:",
     "speculation: what follows a refused draft is kept"),
    ("src/llamita/engine/matches.py", "return int(after[-1]), length", "return int(after[0]), length",
     "drafts: what followed the first of the longest matches"),
    ("src/llamita/engine/sequence.py", "min(self.cache.length, self.first_row)",
     "min(self.cache.length, self.count - 1)", "scores of a prompt: those of an interrupted step are lost"),
    ("src/llamita/engine/cache_memory.py", "youngest = max((*others, sequence)", "youngest = min((*others, sequence)",
     "pausing: the oldest gives way"),
    ("src/llamita/engine/prefixes.py", "if not is_same_owner(prefix.owner, owner):", "if False:",
     "prefixes: shared with other owners"),
    ("src/llamita/engine/sampler.py", "return logits - self._less", "return logits + self._less", "penalties: the sign"),
    ("src/llamita/serve/grammar.py", 'bitorder="little"', 'bitorder="big"', "grammar: the bits of the mask"),
    ("src/llamita/serve/guard.py", '"content-length" in headers and', '"content-length" not in headers and',
     "smuggling: a body with two lengths"),
    ("src/llamita/serve/preparation.py", "self._turns.setdefault(owner, asyncio.Lock())", "asyncio.Lock()",
     "preparation: slow requests of one key take all threads"),
    ("src/llamita/methods/gptq.py", "descending=True, stable=True", "descending=False, stable=True",
     "gptq: inputs of least energy first"),
    ("src/llamita/methods/gptq.py", "energy *= 1 + damping", "energy += damping * energy.mean()",
     "gptq: damping by the mean energy"),
    ("src/llamita/methods/gptq.py", "groups=(order // (inputs // scales.shape[1])).tolist()",
     "groups=(torch.arange(inputs) // (inputs // scales.shape[1])).tolist()", "gptq: another group's scale"),
    ("src/llamita/methods/qronos.py", "missing += residual * layers.residual",
     "missing -= residual * layers.residual", "qronos: the sign of the residual stream's correction"),
    ("src/llamita/methods/equalize.py", "(log - log.mean()) / 2", "log - log.mean()", "equalize: energies are squares"),
    ("src/llamita/methods/rotation_matrices.py", "r1.T @ (gamma[:, None] * r1)", "r1 @ (gamma[:, None] * r1.T)",
     "spinquant: the head's transform, the other way round"),
    ("src/llamita/evaluate/scores.py", "losses[rows] = np.log(total) - shifted", "losses[rows] = total - shifted", "perplexity: the normalizer"),
]  # fmt: skip


# A broken kernel shows here first; the rest of the suite follows.
FIRST = [
    "native/test_kernels.py",
    "native/test_hadamard_kernels.py",
    "native/test_rounding.py",
    "native/test_attention.py",
    "numerics/test_affine.py",
    "evaluate/test_scores.py",
    "engine/test_model.py",
    "engine/test_speculation.py",
    "methods/test_gptq.py",
    "methods/test_transforms.py",
]
NOT_RUN = "tests/project/test_mutations.py"  # fails on every changed tree: it looks for the text as it was


def build(tree: Path, folder: Path) -> None:
    """Compile the native module of `tree` and put it next to its Python files."""
    if not (folder / "build.ninja").exists():
        run(["cmake", "-S", str(tree), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"])
    run(["cmake", "--build", str(folder)])
    module = next(folder.glob("_native*.so"))
    shutil.copy2(module, tree / "src" / "llamita" / module.name)


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


def first_failure(tree: Path) -> str | None:
    """Run the suite on `tree`, kernel tests first; the first test that fails, or None if all pass."""
    return run_tests(tree, [f"tests/{name}" for name in FIRST]) or run_tests(tree, ["tests"])


def run_tests(tree: Path, files: list[str]) -> str | None:
    """Return the first of these tests that fails, or None."""
    # The tree goes first on the path, and finders of an editable installation are kept out.
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__];"
        f"sys.path.insert(0, {str(tree / 'src')!r}); import llamita; assert llamita.__file__.startswith({str(tree)!r});"
        "import pytest; sys.exit(pytest.main(['-q', '-x', '--no-header', '-p', 'no:cacheprovider',"
        f"'--ignore={NOT_RUN}', *sys.argv[1:]]))"
    )
    data = os.environ.get("LLAMITA_DATA", str(ROOT.parent / "shared" / "data"))
    environment = os.environ | {"LLAMITA_DATA": data, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *files]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode and not failed:
        sys.exit(result.stdout[-3000:] + result.stderr[-3000:])
    return failed[0] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=range(1, len(MUTATIONS) + 1))
    args = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__"))
        build(tree, Path(scratch) / "build")
        print(f"unchanged: {first_failure(tree) or 'passes'}  ({sysconfig.get_platform()})", flush=True)
        for number in args.only:
            file, old, new, what = MUTATIONS[number - 1]
            text = (tree / file).read_text("utf-8")
            assert text.count(old) == 1, f"{file}: expected once: {old}"
            (tree / file).write_text(text.replace(old, new), "utf-8")
            build(tree, Path(scratch) / "build")
            failure = first_failure(tree)
            survivors += failure is None
            print(f"{number:2} {what}: {failure or 'SURVIVED'}", flush=True)
            (tree / file).write_text(text, "utf-8")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
