"""Cross-compile the native module for Arm (AArch64) and run its tests under qemu, on every instruction set.

    python tools/arm.py [--or-skip] [pytest arguments]

Everything is in build/arm: an Arm Python from the distribution's own packages (unpacked, not installed), its packages
from the registry as constraints.txt pins them, and the module. It needs Debian or Ubuntu on another processor; as
root it installs qemu and the compiler. With --or-skip it prints a line and succeeds if something cannot be had.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "arm"
SYSROOT, SITE, TREE, PYTHON = BUILD / "sysroot", BUILD / "site", BUILD / "tree", BUILD / "python"

HOST_PACKAGES = {"qemu-aarch64": "qemu-user", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
ARM_PACKAGES = ["python3", "libpython3-dev", "libstdc++6"]
ARCHIVES = {  # distribution: the address of its Arm packages, and their keyring
    "debian": ("http://deb.debian.org/debian", "main", "debian-archive-keyring.gpg"),
    "ubuntu": ("http://ports.ubuntu.com/ubuntu-ports", "main universe", "ubuntu-archive-keyring.gpg"),
}
TEST_PACKAGES = ["pytest", "hypothesis", "nanobind"]
WHEEL_PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64"]

# Features of qemu's processors: the newest, one with only dot products, one with neither
PROCESSORS = {"max": "neon-i8mm neon-dotprod scalar", "neoverse-n1": "neon-dotprod scalar", "cortex-a53": "scalar"}
TESTS = [
    "native/test_kernels.py",
    "native/test_hadamard_kernels.py",
    "native/test_attention.py",
    "native/test_rounding.py",
    "native/test_errors.py",
    "native/test_threads.py",
    "engine/test_adapters.py",
]
# Left out: the scalar kernels alone (the same C++ as everywhere, and slow here; other tests compare with them),
# what qemu does not do (forks together with threads, limits of memory), and commands that reach no kernel.
SELECTION = "not [scalar and not fork and not cannot_start and not commands_say_it"
DIGEST = """
import hashlib, llamita
for preset in (None, "arm"):
    llm = llamita.load("embedded", scheme=preset, threads=2)
    logits = llm.logits(llm.tokenizer.encode("Once upon a time there was a little dog named Max."))
    print(preset, hashlib.sha256(logits.tobytes()).hexdigest())
"""
GENERATE = """
from llamita.cli import main
main("generate embedded --prompt Once --greedy --preset llama3.2 --max-tokens 24 --threads 2".split())
"""


class Unavailable(Exception):
    """Something is missing on this machine; the text says what, and what to try."""


def run(command: list[str], needed: str) -> None:
    """Run a step of the set-up; print nothing of its output but an error, in one line."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        lines = result.stdout.strip().splitlines() or [f"exit status {result.returncode}"]
        error = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[-1])
        raise Unavailable(f"expected {needed}, got from {Path(command[0]).name}: {error}")


def host_tools() -> None:
    missing = [package for program, package in HOST_PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(f"expected {' and '.join(missing)}; try {' '.join(install)} as root")
    run(["apt-get", "update"], "the lists of packages")
    run(install, " and ".join(missing))


def apt(*arguments: str) -> list[str]:
    """Return an apt-get command for Arm packages; its lists and archives are separate from the system's."""
    release = platform.freedesktop_os_release()
    archive = ARCHIVES.get(release["ID"])
    if not archive:
        raise Unavailable(f"expected Debian or Ubuntu, got {release['ID']}")
    where = BUILD / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (where / folder).mkdir(parents=True, exist_ok=True)
    (where / "status").touch()
    url, components, keyring = archive
    signed = f"[signed-by=/usr/share/keyrings/{keyring}]"
    (where / "sources.list").write_text(f"deb {signed} {url} {release['VERSION_CODENAME']} {components}\n")
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": where,
        "Dir::State::status": where / "status", "Dir::Cache": where / "cache",
        "Dir::Etc::SourceList": where / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "APT::Update::Error-Mode": "any",
    }  # fmt: skip
    settings = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["apt-get", "-qq", *settings, *arguments]


def arm_python() -> None:
    """Make an Arm Python with its headers, and a script that runs it under qemu as if it were this machine's."""
    if not (SYSROOT / "usr/bin/python3").exists():
        run(apt("update"), "the list of Arm packages")
        download = ["install", "-y", "--no-install-recommends", "--download-only", *ARM_PACKAGES]
        run(apt(*download), "an Arm Python")
        aside = SYSROOT.with_suffix(".new")
        shutil.rmtree(aside, ignore_errors=True)
        for package in sorted((BUILD / "apt/cache/archives").glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(aside)], f"the contents of {package.name}")
        if not (aside / "lib").exists():  # where the distribution has it as a link, no package holds it
            (aside / "lib").symlink_to("usr/lib")
        aside.rename(SYSROOT)
    # Python finds its library by PYTHONHOME, and itself, for tests that start another, by the name given.
    PYTHON.write_text(
        "#!/bin/sh\n"
        f"export PYTHONHOME='{SYSROOT}/usr' PYTHONPATH='{TREE}:{SITE}'\n"
        f"exec qemu-aarch64 -cpu \"${{LLAMITA_ARM_CPU:-max}}\" -L '{SYSROOT}' -0 '{PYTHON}'"
        f" '{SYSROOT}/usr/bin/python3' \"$@\"\n"
    )
    PYTHON.chmod(0o755)


def python_packages() -> None:
    """Install the packages that the lean side and the tests import, as wheels for the Arm Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        line for line in project["optional-dependencies"]["dev"] if line.split("==")[0] in TEST_PACKAGES
    ]
    stamp = BUILD / "site.txt"
    if stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return
    version = output(PYTHON, "import sys; print('%d.%d' % sys.version_info[:2])")
    shutil.rmtree(SITE, ignore_errors=True)
    platforms = [part for name in WHEEL_PLATFORMS for part in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(SITE), "--no-compile", "--only-binary=:all:", "--python-version", version]
    run([*command, *platforms, "--constraint", str(ROOT / "constraints.txt"), *wanted], "wheels for Arm")
    stamp.write_text("\n".join(wanted))


def build_module() -> None:
    """Compile the native module into a copy of the package: the source folder keeps this machine's own."""
    tools = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    build = BUILD / "cmake"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "CMAKE_CXX_FLAGS": f"-idirafter {SYSROOT}/usr/include",  # Python's headers include others from there
        "Python_EXECUTABLE": PYTHON,
    }
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    for command in (configure, ["cmake", "--build", build]):
        subprocess.run(command, check=True, env=tools, stdout=subprocess.DEVNULL)
    shutil.rmtree(TREE, ignore_errors=True)
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src" / "llamita", TREE / "llamita", ignore=leave)
    module = next(build.glob("_native*.so"))
    shutil.copy2(module, TREE / "llamita" / module.name)


def output(python: Path | str, program: str, **variables: str) -> str:
    """Return the output of a Python program."""
    environment = {**os.environ, **variables}
    result = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{python}: expected exit status 0, got {result.returncode}\n{result.stderr}")
    return result.stdout.strip()


def check(what: str, found: str, expected: str) -> None:
    if found != expected:
        sys.exit(f"{what}: expected\n{expected}\ngot\n{found}")
    print(f"{what}: as expected", flush=True)


def check_detection() -> None:
    """Check that every processor is offered its instruction sets, the best first."""
    program = "from llamita import _native; print(*_native.available_isas())"
    for processor, expected in PROCESSORS.items():
        found = output(PYTHON, program, LLAMITA_ARM_CPU=processor)
        check(f"instruction sets of {processor}", found, expected)


def check_whole_model() -> None:
    """Check that the embedded model computes exactly this machine's logits, and tells the same story."""
    for what, program in (("logits", DIGEST), ("story", GENERATE)):
        expected = output(sys.executable, program)
        for isa in ("neon-dotprod", "neon-i8mm"):
            check(f"{what} on {isa}", output(PYTHON, program, LLAMITA_ISA=isa), expected)


def main() -> int:
    arguments = [a for a in sys.argv[1:] if a != "--or-skip"]
    try:
        if platform.machine() in ("aarch64", "arm64"):
            raise Unavailable("this machine is one: make test runs the same tests on it")
        if sys.platform != "linux":
            raise Unavailable(f"expected Linux, whose programs qemu-user runs, got {sys.platform}")
        BUILD.mkdir(parents=True, exist_ok=True)
        host_tools()
        arm_python()
        python_packages()
    except Unavailable as error:
        print(f"Arm not tested: {error}", file=sys.stderr)
        return 0 if "--or-skip" in sys.argv else 1
    build_module()
    check_detection()
    check_whole_model()
    selected = ["-k", SELECTION, *(f"tests/{name}" for name in TESTS)]
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or selected)]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
