"""Settings of every test: offline, tables as wide as they need, and no waiting for the disk."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it once
os.environ["COLUMNS"] = "200"


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need not survive a power cut, and on a busy disk each fsync takes tens of milliseconds."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
