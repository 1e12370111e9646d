"""The parts that `llamita serve` puts together: keys, access, kept prompts."""

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
from llamita.serve.state import Limits, make_state

__all__ = ["Bounds", "Limits", "Models", "access", "collect_keys", "kept_prefixes", "listen", "make_state", "serve"]

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def collect_keys(keys: Sequence[str], file: Path | None, admin_file: Path | None) -> Keys:
    """Return the keys of the command line and of files.

    Raises:
        InputError: a file has no keys, or a key is too short.
    """
    users = [check_key(key, "--api-key") for key in keys]
    users += read_keys(file) if file else []
    return Keys(users, read_keys(admin_file) if admin_file else [])


def access(host: str, hosts: Sequence[str], origins: Sequence[str]) -> Access:
    """Return who may connect. On this machine's own address, only its names are accepted in the Host header.

    Raises:
        InputError: an origin is none.
    """
    for origin in origins:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise InputError("--allow-origin", "http://HOST or https://HOST, with its port", repr(origin))
    names = frozenset(host_name(name) for name in hosts)
    is_local = host in _LOOPBACK
    return Access(_LOOPBACK | names if is_local else names or None, frozenset(origins))


@contextmanager
def kept_prefixes(llms: Mapping[str, LLM], file: Path | None, note: Callable[[str], None]) -> Iterator[None]:
    """Find the prompts that an earlier server kept, and save them at the end.

    Several models have a file each: FILE, FILE.1 and so on. A file that does not fit is not used, and left as it is: it
    may be of another model, or something else altogether.

    Raises:
        InputError: there is no directory for the file.
    """
    if file is None:
        yield
        return
    if not file.absolute().parent.is_dir():
        raise InputError("--prefix-file", "a directory that exists", str(file.parent))
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
