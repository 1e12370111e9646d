"""Build the native module with sanitizers and run its tests.

python tools/sanitize.py [--thread] [pytest arguments]

Without an option: the address and undefined-behaviour sanitizers. With --thread: the thread sanitizer.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Sanitizer(NamedTuple):
    flags: str  # of -fsanitize
    libraries: tuple[str, ...]
    variables: dict[str, str]
    tests: tuple[str, ...]


MEMORY = Sanitizer(
    "address,undefined",
    ("libasan.so", "libubsan.so", "libstdc++.so"),
    {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # Python's own leaks
    (
        "tests/native/test_kernels.py",
        "tests/native/test_tiles.py",
        "tests/native/test_hadamard_kernels.py",
        "tests/native/test_rounding.py",
        "tests/native/test_attention.py",
    ),
)

# A race ends the process with code 66: pytest's own, or a test's program, whose code the test looks at.
# die_after_fork: otherwise a child that was forked while other threads ran could start none.
# detect_deadlocks: NumPy's and Python's own locks are not ours to judge.
THREAD = Sanitizer(
    "thread",
    ("libtsan.so", "libstdc++.so"),
    {"TSAN_OPTIONS": "halt_on_error=1 die_after_fork=0 detect_deadlocks=0 report_signal_unsafe=0"},
    ("tests/native/test_threads.py", "tests/native/test_stress_threads.py",
     "tests/native/test_kernels.py::test_calls_from_several_threads_do_not_disturb_each_other",
     "tests/native/test_tiles.py::test_the_check_at_the_start_passes_on_every_set_and_counts_its_rounds",
     "tests/native/test_kernels.py::test_instruction_sets_and_threads_give_the_same_bits"),
)  # fmt: skip


def build(sanitizer: Sanitizer, folder: Path) -> Path:
    """Compile the module into a copy of the package under `folder`; return the copy."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
                 f"-DLLAMITA_SANITIZE={sanitizer.flags}",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(folder)], check=True)
    package = folder / "tree" / "llamita"
    shutil.copytree(ROOT / "src" / "llamita", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    module = next(folder.glob("_native*.so"))
    shutil.copy2(module, package / module.name)
    return package


def runtime(names: tuple[str, ...]) -> str:
    """Return the sanitizer's runtime to preload, because Python itself is not instrumented."""
    return ":".join(
        subprocess.run(["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in names
    )


def main() -> None:
    arguments = sys.argv[1:]
    thread = arguments[:1] == ["--thread"]
    sanitizer = THREAD if thread else MEMORY
    package = build(sanitizer, ROOT / "build" / ("sanitize-thread" if thread else "sanitize"))
    environment = os.environ | sanitizer.variables | {
        "LD_PRELOAD": runtime(sanitizer.libraries),
        "PYTHONPATH": str(package.parent),
    }  # fmt: skip
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__];"
        f"import llamita; assert llamita.__file__.startswith({str(package)!r});"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    # Where Linux randomizes more address bits than it knew of, libtsan before GCC 14 stops with "unexpected
    # memory mapping".
    plain = ["setarch", platform.machine(), "--addr-no-randomize"] if thread else []
    tests = arguments[thread:] or ["-q", "-x", "-p", "no:cacheprovider", *sanitizer.tests]
    command = [*plain, sys.executable, "-c", program, *tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
