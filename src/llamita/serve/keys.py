"""API keys: who may ask, and whose prompts are whose.

Keys are kept and compared as SHA-256 digests, in constant time and all of them each time, and are never logged.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from llamita.errors import InputError

_OWNER_LETTERS = 16  # of the digest: names an owner without giving its key away
_LARGEST_FILE = 1 << 20  # bytes
_SHORTEST = 8  # characters; a shorter key can be tried out


class Keys:
    """The keys of a server.

    Args:
        keys: those of users.
        admin_keys: those of administrators, who may do what users may.
    """

    def __init__(self, keys: Iterable[str] = (), admin_keys: Iterable[str] = ()) -> None:
        self._users = [_digest(key) for key in keys]
        self._admins = [_digest(key) for key in admin_keys]

    @property
    def are_needed(self) -> bool:
        """True if a request needs a key."""
        return bool(self._users)

    @property
    def has_admins(self) -> bool:
        """True if there are administrators."""
        return bool(self._admins)

    def owner(self, key: str) -> str | None:
        """Return the tag of a key's owner, None for a key that is not known."""
        digest = _digest(key)
        found = False
        for known in [*self._users, *self._admins]:
            found |= hmac.compare_digest(digest, known)
        return digest.hex()[:_OWNER_LETTERS] if found else None

    def is_admin(self, key: str) -> bool:
        """Return whether a key is an administrator's."""
        digest = _digest(key)
        found = False
        for known in self._admins:
            found |= hmac.compare_digest(digest, known)
        return found


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        InputError: the file cannot be read, has no key, or a key is too short.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        lines = data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "a text file of keys", str(error)) from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or len(data) > _LARGEST_FILE:
        raise InputError(str(path), "keys, one a line", "none" if not keys else "a file too large")
    return [check_key(key, str(path)) for key in keys]


def check_key(key: str, where: str) -> str:
    """Return the key.

    Raises:
        InputError: it is too short, or HTTP cannot carry it. The message does not repeat it.
    """
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(where, f"keys of at least {_SHORTEST} ASCII characters without spaces", "another one")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
