"""Make environments, models and processes: all that must exist before anything is timed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, HERE, MODELS, Contender

# llama.cpp is built for the very processor; pip must not take a wheel that it built for another. Where that has AMX,
# GCC 12 must not build it: it takes ldtilecfg to read 8 bytes, drops the stores of the others, and llama.cpp dies.
BUILD_SETTINGS = {
    "llamacpp": {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_NO_BINARY": "llama-cpp-python",
    }
}
_CLANG = "-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++"
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # everything is made here


class PeerError(Exception):
    """One contender cannot run; the others can."""


def python_of(workdir: Path, environment: str) -> str:
    """Return the Python of an environment, installed on first use from its list of exact versions."""
    if not environment:
        return sys.executable
    folder = workdir / environment
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = (HERE / f"{environment}.txt").read_text("utf-8")
    if done.exists() and done.read_text("utf-8") == wanted:
        return str(python)
    print(f"installing {environment} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--no-deps", "-r", str(HERE / f"{environment}.txt")]
    _check([*_NICE, *command], folder.with_suffix(".log"), build_settings(environment, has_amx()))
    done.write_text(wanted, "utf-8")
    return str(python)


def build_settings(environment: str, amx: bool) -> dict[str, str]:
    """Return the variables for installing an environment: on a machine with AMX, Clang compiles if it is there."""
    settings = dict(BUILD_SETTINGS.get(environment, {}))
    if amx and "CMAKE_ARGS" in settings:
        if shutil.which("clang") and shutil.which("clang++"):
            settings["CMAKE_ARGS"] += f" {_CLANG}"
        else:
            print(f"{environment}: no clang; as built by GCC 12 it dies on machines with AMX", file=sys.stderr)
    return settings


def has_amx() -> bool:
    """Return whether Linux lists AMX's int8 products for this processor."""
    listing = Path("/proc/cpuinfo")
    return listing.exists() and " amx_int8" in listing.read_text("utf-8")


_NICE = ["nice", "-n", "10"] if shutil.which("nice") else []


def model_of(workdir: Path, name: str) -> Path:
    """Return a model's directory or file, made on first use."""
    out = workdir / "models" / name
    if out.exists():
        return out
    recipe = MODELS[name]
    source = model_of(workdir, recipe.source) if recipe.source else Path()
    python = python_of(workdir, recipe.environment)
    print(f"making {out}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"part-{name}")
    for leftover in out.parent.glob(f"part-{name}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    _check([*_NICE, python, *recipe.command(source, aside)], out.with_suffix(".log"), {})
    aside.rename(out)
    return out


def size_of(model: Path) -> int:
    """Return the bytes of a model's weight files."""
    if model.is_file():
        return model.stat().st_size
    weights = [*model.glob("*.safetensors"), *model.glob("openvino_model.bin")]
    return sum(path.stat().st_size for path in weights)


def _check(command: list[str], log: Path, settings: dict[str, str]) -> None:
    """Run a command to its end, with its output in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **OFFLINE, **settings}
        ).returncode
    if status:
        last = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        raise PeerError(f"exit {status}: {' '.join(last)[:300]}; see {log}")


class Worker:
    """A process that holds one engine. It is stopped whenever nothing is asked of it, so it cannot spin."""

    def __init__(self, python: str, script: str, options: dict[str, Any], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / script), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **OFFLINE},
            )
        self.log = log
        self.about = self._answer()
        self._pause()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the answer; PeerError if the engine failed or ended."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"it ended; see {self.log}") from None
        answer = self._answer()
        self._pause()
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"ended with status {self.process.wait()}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        if self.process.returncode is not None:  # it has ended already
            return
        # A signal takes a moment: until it has stopped, or ended, it would run at the same time as the next one.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def start(workdir: Path, name: str, variant: str, threads: int) -> Worker:
    """Start a contender's process; make its environment and model first if need be."""
    contender = CONTENDERS[name]
    python, model = python_of(workdir, contender.environment), model_of(workdir, contender.model)
    options = {"model": str(model), "threads": threads, **contender.variants[variant]}
    return Worker(python, contender.worker, options, workdir / "logs" / f"{name}.log")


def start_limits(workdir: Path, threads: int) -> Worker:
    """Start the process that measures what the machine can do."""
    options = {"limits": True, "threads": threads}
    return Worker(sys.executable, "work_llamita.py", options, workdir / "logs" / "limits.log")


def model_bytes(workdir: Path, contender: Contender) -> int:
    """Return the bytes on disk that a contender reads."""
    return size_of(workdir / "models" / contender.model)
