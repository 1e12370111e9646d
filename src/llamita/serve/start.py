"""The parts that `llamita serve` puts together: keys, access, kept prompts."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from llamita.engine.llm import LLM
from llamita.errors import InputError, LlamitaError
from llamita.serve.guard import Access, host_name
from llamita.serve.keys import Keys, check_key, read_keys
from llamita.serve.queue_limits import Bounds
from llamita.serve.run import listen, serve
from llamita.serve.served import Models
from llamita.serve.state import Limits, ServerState, make_state

__all__ = [  # what the command takes from here
    "Bounds", "Limits", "Models", "access", "check_paths", "collect_keys", "listen", "make_state",
    "serve_keeping",
]  # fmt: skip

KEY_VARIABLE = "LLAMITA_API_KEY"  # of the environment: a key that requests need
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def collect_keys(keys: Sequence[str] | None, file: Path | None, admin_file: Path | None) -> Keys:
    """Return the keys of the command line, of the environment and of files.

    Raises:
        InputError: a file has no keys, or a key is too short.
    """
    users = [check_key(key, "--api-key") for key in keys or ()]
    users += [check_key(os.environ[KEY_VARIABLE], KEY_VARIABLE)] if os.environ.get(KEY_VARIABLE) else []
    users += read_keys(file) if file else []
    return Keys(users, read_keys(admin_file) if admin_file else [])


def check_paths(adapters: Path | None, admin_file: Path | None, prefix_file: Path | None) -> None:
    """Raise InputError for a path that cannot be used, before a model is loaded."""
    if adapters and not adapters.is_dir():
        raise InputError("--adapters", "a directory", str(adapters))
    if adapters and not admin_file:
        raise InputError("--adapters", "keys of administrators, who load them", "none", "try --admin-key-file FILE")
    if prefix_file and not prefix_file.absolute().parent.is_dir():
        raise InputError("--prefix-file", "a directory that exists", str(prefix_file.parent))
    if prefix_file and prefix_file.is_dir():
        raise InputError("--prefix-file", "a file", f"the directory {prefix_file}")


def access(host: str, hosts: Sequence[str] | None, origins: Sequence[str] | None, is_guarded: bool) -> Access:
    """Return who may connect. On this machine's own address, only its names are accepted in the Host header.

    Raises:
        InputError: an origin is none, or others can reach the address, where anybody may ask.
    """
    if host not in _LOOPBACK and not is_guarded:
        expected = f"one of {', '.join(sorted(_LOOPBACK))} without keys"
        raise InputError("--host", expected, host, "try --api-key-file FILE, or --no-auth")
    for origin in origins or ():
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise InputError("--allow-origin", "http://HOST or https://HOST, with its port", repr(origin))
    names = frozenset(host_name(name) for name in hosts or ())
    is_local = host in _LOOPBACK
    return Access(_LOOPBACK | names if is_local else names or None, frozenset(origins or ()))


def serve_keeping(
    file: Path | None,
    note: Callable[[str], None],
    state: ServerState,
    access: Access,
    listener: socket.socket,
    when_ready: Callable[[int], None],
) -> None:
    """Serve until the end; see `serve` and `_kept_prefixes`."""
    with _kept_prefixes(state.models.llms, file, note):
        serve(state, access, listener, when_ready, note=note)


@contextmanager
def _kept_prefixes(llms: Mapping[str, LLM], file: Path | None, note: Callable[[str], None]) -> Iterator[None]:
    """Find the prompts that an earlier server kept, and save them at the end.

    Several models have a file each: FILE, FILE.1 and so on. A file that does not fit is not used, and left as it is: it
    may be of another model, or something else altogether.
    """
    if file is None:
        yield
        return
    files = [file.with_name(f"{file.name}.{i}") if i else file for i in range(len(llms))]
    fitting = []
    for llm, path in zip(llms.values(), files, strict=True):
        if path.exists():
            try:
                llm.scheduler.load_prefixes(path, llm.adapters)
            except LlamitaError as error:
                note(f"--prefix-file: {error}; it is not used and left as it is, and nothing is saved")
                continue
        fitting.append((llm, path))
    try:
        yield
    finally:
        for llm, path in fitting:
            llm.scheduler.save_prefixes(path)
