"""Processes that do what may take too long or too much memory: each answers lines of text, and can be ended.

`system/child.py` is the other side. A thread that asks has a process for itself; it is kept for whoever asks next.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

from llamita.system import child


class Ended(Exception):
    """A process ended instead of answering.

    Attributes:
        code: its exit code; minus the number of the signal that ended it.
        last: the last line of its stderr, "" without one.
    """

    def __init__(self, code: int, errors: str) -> None:
        self.code, self.last = code, (errors.strip().splitlines() or [""])[-1]
        super().__init__(f"exit code {code}")


class Helpers:
    """The processes of one program. Threads may share it; they end with it.

    Args:
        program: a file of Python.
        arguments: of its command line.
        greeting: a line that each process gets first, and does not answer; None for none.
    """

    def __init__(self, program: str, arguments: Sequence[str], greeting: str | None = None) -> None:
        self._command = [sys.executable, "-P", program, *arguments]
        self._greeting = greeting
        self._idle: list[_Process] = []
        self._lock = Lock()
        _ALL.add(self)

    def ask(self, request: str) -> str:
        """Return the answer to a request; both are one line.

        Raises:
            Ended: the process ended; the next request gets another one.
        """
        process = self._take()
        try:
            answer = process.ask(request)
        except BaseException:  # an interrupt, too: the next request must not get this one's answer
            process.end()
            raise
        with self._lock:
            self._idle.append(process)
        return answer

    def _take(self) -> "_Process":
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if not process.has_ended():
                    return process
                process.end()
        return _Process(self, self._command, self._greeting)

    def _leave_to_parent(self) -> None:
        """In a forked child: start other processes when they are needed, and leave the present ones to the parent."""
        self._lock = Lock()  # another thread may have held it
        self._idle = []


_ALL: "weakref.WeakSet[Helpers]" = weakref.WeakSet()


def _after_fork() -> None:
    for helpers in _ALL:
        helpers._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


class _Process:
    """One process; it ends with its owner, or by `end`."""

    def __init__(self, owner: Helpers, command: Sequence[str], greeting: str | None) -> None:
        # In a process group of its own: Ctrl-C at the terminal stops an answer, not this process.
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=child.environment(),
            process_group=0,
        )
        self.end = weakref.finalize(owner, _end, self._popen, os.getpid())
        self._greeting = greeting

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def ask(self, request: str) -> str:
        assert self._popen.stdin
        assert self._popen.stdout
        with suppress(BrokenPipeError):
            if self._greeting is not None:
                self._popen.stdin.write(self._greeting + "\n")
                self._greeting = None
            self._popen.stdin.write(request + "\n")
            self._popen.stdin.flush()
        if line := self._popen.stdout.readline():
            return line
        _, errors = self._popen.communicate()
        raise Ended(self._popen.returncode, errors)


def _end(popen: "subprocess.Popen[str]", owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it to its parent
        popen.kill()
        popen.communicate()
