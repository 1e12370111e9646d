"""The hub: each of its failures is one line, and what is downloaded."""

from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from llamita.errors import RunError
from llamita.imports import hub
from llamita.imports.hub import PATTERNS
from llamita.imports.open import resolve
from llamita.system.files import is_companion

ANSWER = Mock(headers={}, request=None)  # of a server; its class belongs to the hub's HTTP client


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("403\nmore", response=ANSWER), "gated; accept its licence at"),
        (errors.RepositoryNotFoundError("404\nmore", response=ANSWER), "no such model"),
        (errors.LocalEntryNotFoundError("no\nentry"), "not in the hub's cache"),
        (hub._NO_REVISION("no\nrevision"), "not in the hub's cache"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (RuntimeError("the downloader's own"), "download failed: the downloader's own"),
        (ConnectionError("no route"), "not in the hub's cache"),
        (errors.HfHubHTTPError("500 server\nmore", response=ANSWER), "download failed: 500 server"),
        (OSError(28, "No space left on device"), "download failed"),
        (errors.HFValidationError("bad name"), "no such model"),
    ],
)
def test_each_failure_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(RunError, match=message) as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)
    assert "owner/model" in str(caught.value)


def test_offline_without_a_copy_is_one_line() -> None:
    with pytest.raises(RunError, match="not in the hub's cache"):
        resolve("nobody-at-all/no-such-model")


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "license.txt", "Licence.md", "Notice", "ACCEPTABLE_USE_POLICY.md", "COPYRIGHT",
     "use_policy.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "SOURCE_README.md"],
)  # fmt: skip
def test_what_travels_with_the_weights_comes_from_the_hub_too(name: str) -> None:
    assert is_companion(name)
    assert list(filter_repo_objects([name, "pytorch_model.bin"], allow_patterns=list(PATTERNS))) == [name]


def test_what_needs_not_travel_stays_on_the_hub() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "README.md", "llamita.json"]
    others = ["original/consolidated.00.pth", "model.gguf", "optimizer.pt", "tokenizer.py"]
    assert list(filter_repo_objects(names + others, allow_patterns=list(PATTERNS))) == names
