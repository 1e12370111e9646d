"""Settings of every test: offline, tables as wide as they need, and no waiting for the disk."""

import os
from collections.abc import Iterator

import pytest

from llamita import _native

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it once
os.environ["COLUMNS"] = "200"


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need not survive a power cut, and on a busy disk each fsync takes tens of milliseconds."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is converted on the way stays out of the user's cache."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path_factory.getbasetemp() / "llamita-cache"))


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set of this machine."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)
