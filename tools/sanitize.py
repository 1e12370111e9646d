"""Build the native module with the address and undefined-behaviour sanitizers and run its tests.

python tools/sanitize.py [pytest arguments]
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
TESTS = ["tests/test_kernels.py", "tests/test_rounding.py", "tests/test_attention.py"]


def main() -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DLLAMITA_SANITIZE=ON",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True)
    package = BUILD / "tree" / "llamita"
    shutil.copytree(
        ROOT / "src" / "llamita", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    module = next(BUILD.glob("_native*.so"))
    shutil.copy2(module, package / module.name)
    # Python itself is not instrumented: the runtime must be there before it starts, its leaks aside.
    libraries = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package.parent),
    }
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__];"
        f"import llamita; assert llamita.__file__.startswith({str(package)!r});"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = sys.argv[1:] or ["-q", "-x", "-p", "no:cacheprovider", *TESTS]
    sys.exit(
        subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment).returncode
    )


if __name__ == "__main__":
    main()
