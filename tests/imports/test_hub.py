"""Models of the hub, against a stand-in of its HTTP interface: what is brought, kept, resumed and said of failures."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command import run
from foreign_models import as_bin, make_gguf_checkpoint, write_parts
from hub_server import Hub, Result, files_of, serving
from huggingface_hub import errors
from tiny import llama3_rope, make_checkpoint

from llamita.errors import InputError, RunError
from llamita.formats.gguf import GgufFile, write_gguf
from llamita.imports import hub as hub_module
from llamita.imports.names import HubName
from llamita.imports.open import resolve
from llamita.system.files import sha256_file

OTHERS = {"optimizer.pt": b"1", "original/consolidated.00.pth": b"1", "README.md": b"# m", "LICENSE": b"free"}
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PARTS = [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
BIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "head_dim": 32,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
MB = 1 << 20
PLAN = ["plan", "o/float", "--preset", "arm"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Return the files of each repository of the tests, by the name of its model."""
    place = tmp_path_factory.mktemp("models")
    source = make_gguf_checkpoint(place, "llama31", rope_scaling=llama3_rope(8.0))
    run("quantize", source, "-o", place / "packed")
    run("export", place / "packed", "--to", "gguf", "-o", place / "out")
    gguf, parts = place / "out" / "model.gguf", write_parts(place / "out" / "model.gguf", place / "parts")
    data, junk = gguf.read_bytes(), b"GGUF and no more"
    several = {"m-Q8_0.gguf": junk, "m-Q4_K_M.gguf": data, "m-Q4_K_S.gguf": junk, "mmproj-F16.gguf": junk}
    several |= {f"split/{part.name}": part.read_bytes() for part in parts}
    sharded = files_of(make_checkpoint(place / "sharded", "llama3", shards=2))
    odd = {name.replace("-of-00002", ""): data.replace(b"-of-00002", b"") for name, data in sharded.items()}
    return {
        "float": {**sharded, **OTHERS, **several},
        "odd": odd,
        "one": {"m.gguf": data, "imatrix.gguf": junk, "mmproj.gguf": junk, "config.json": b"{}"},
        "several": {**several, "config.json": b"{}"},
    }


@pytest.fixture
def hub(models: dict[str, dict[str, bytes]], tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "hub-home") as hub:
        for name, files in models.items():
            hub.repositories[f"o/{name}"].commit(files)
        yield hub


def generate(name: str, *options: object) -> list[Any]:
    return ["generate", name, "--prompt", "abc", "--greedy", "--max-tokens", "8", *options]


def fine(results: list[Result]) -> list[str]:
    """Return what commands printed; all must have succeeded."""
    assert [result.code for result in results] == [0] * len(results), [result.err for result in results]
    return [result.out for result in results]


def failure(result: Result, code: int = 1) -> str:
    """Return the one line that a command printed."""
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
    return result.err.strip()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("o/float", ["LICENSE", "README.md", "config.json", *SHARDS, "model.safetensors.index.json", *TOKENIZER]),
        ("o/one", ["m.gguf"]),
        ("o/several:q4_k_m", ["m-Q4_K_M.gguf"]),
        ("o/several@main/m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        (f"o/several/split/{PARTS[1]}", PARTS),
    ],
)
def test_a_model_comes_alone_and_is_found_again_offline(hub: Hub, name: str, files: list[str]) -> None:
    online = fine(hub.run(generate(name)))
    assert hub.fetched() == files
    assert fine(hub.run(generate(name), offline=True)) == online
    assert not hub.fetched()


def test_pickles_are_brought_and_converted_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    model = as_bin(make_checkpoint(tmp_path / "bin", "llama3"), 2)
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    hub.repositories["o/bin"].commit(files_of(model) | OTHERS)
    online = fine(hub.run(generate("o/bin")))
    assert hub.fetched() == ["LICENSE", "README.md", "config.json", *names, *TOKENIZER]
    assert fine(hub.run(generate("o/bin"), generate(str(model)), offline=True)) == online * 2


def test_plans_read_a_config_or_a_header(hub: Hub) -> None:
    hub.repositories["o/shape"].commit({"config.json": hub.repositories["o/float"].file("config.json")})
    fine(hub.run(PLAN, ["quantize", "o/float", "--dry-run"], ["plan", "o/shape", "--preset", "arm"]))
    assert hub.fetched() == ["config.json"]
    plan, facts, _ = fine(
        hub.run(["plan", "o/several:Q4_K_M", "--preset", "arm", "--json"], ["inspect", "o/several:Q4_K_M", "--json"],
                ["quantize", f"o/several/split/{PARTS[2]}", "--dry-run"])
    )  # fmt: skip
    assert json.loads(plan)["source"] == json.loads(facts)["path"] == "o/several:Q4_K_M"
    assert json.loads(facts)["files"] == ["m-Q4_K_M.gguf"]
    assert hub.fetched() == ["m-Q4_K_M.gguf", *PARTS]
    assert all(range_ for _, name, range_ in hub.requests if name.endswith(".gguf"))
    assert not list(hub.cache.rglob("*.gguf"))


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    old, new = (make_checkpoint(tmp_path / f"seed{seed}", "llama3", seed=seed) for seed in (1, 2))
    commit = hub.repositories["o/m"].commit(files_of(old), "v1", "feature/x", "refs/pr/1")
    hub.repositories["o/m"].commit(files_of(new))
    ways = [["o/m"], ["o/m@v1"], ["o/m@feature/x"], [f"o/m@{commit}"], ["o/m", "--revision", "refs/pr/1"]]
    fine(hub.run(*(["quantize", *way, "-o", tmp_path / f"out{n}"] for n, way in enumerate(ways))))
    records = [json.loads((tmp_path / f"out{n}" / "llamita.json").read_text())["source"] for n in range(len(ways))]
    assert [record["name"] for record in records] == [*(way[0] for way in ways[:-1]), "o/m@refs%2Fpr%2F1"]
    hashes = [sha256_file(model / "model.safetensors") for model in (old, new)]
    assert [record["files"]["model.safetensors"] for record in records] == [hashes[1], *[hashes[0]] * 4]
    assert "base_model: o/m\n" in (tmp_path / "out1" / "README.md").read_text()
    text = tmp_path / "text"
    text.write_text("abc " * 20)
    options = ["--text", text, "--json"]
    _, packed, rounded = fine(
        hub.run(generate("o/m", "--revision", "feature/x"), ["evaluate", tmp_path / "out1", *options],
                ["evaluate", "o/m:llama3.2", "--revision", "v1", *options], offline=True)
    )  # fmt: skip
    assert [model["name"] for model in json.loads(packed)["models"]] == ["m@v1", "out1"]
    assert json.loads(packed)["models"][1]["text"] == json.loads(rounded)["models"][1]["text"]


def test_import_and_verify_take_names(hub: Hub, tmp_path: Path) -> None:
    fine(hub.run(["import", "o/several:Q4_K_M", "-o", tmp_path / "taken"]))
    hub.repositories["o/packed"].commit(files_of(tmp_path / "taken"))
    record = json.loads((tmp_path / "taken" / "llamita.json").read_text())["source"]
    assert record["name"].endswith(f"snapshots/{hub.repositories['o/several'].names['main']}/m-Q4_K_M.gguf")
    fine(hub.run(["verify", "o/packed", "--revision", "main"], ["inspect", "o/packed"]))


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    hub.repositories["o/gated"].commit({"model.safetensors": b"", "config.json": b"{}", "m-Q4_0.gguf": b"GGUF"})
    hub.repositories["o/gated"].gated = True
    hub.repositories["o/empty"].commit({"README.md": b""})
    hub.repositories["o/torn"].commit({"a-00001-of-00002.gguf": b"GGUF"})
    expected = [
        (generate("o/gated"), 1, "o/gated: the model is gated; accept its licence at http"),
        (["plan", "o/gated"], 1, "gated"),
        (["plan", "o/several"], 2, "o/several: expected one GGUF, got Q4_K_M"),
        (["plan", "o/gated:Q4_0"], 1, "gated"),
        (generate("o/none"), 1, "o/none: no such directory, and the hub has no such model"),
        (generate("a--b/c"), 1, "a--b/c: no such directory, and the hub has no such model"),
        (generate("o/float@v9"), 1, "o/float@v9: the hub's model has no such revision"),
        (generate("o/float/x.gguf"), 2, "o/float/x.gguf: expected a file of the hub's model, got m-Q"),
        (generate("o/several"), 2, "o/several: expected one GGUF, got Q4_K_M (0.3 MB), Q4_K_S"),
        (generate("o/several:Q4_K"), 2, "o/several:Q4_K: expected one such GGUF"),
        (generate("o/empty"), 2, "o/empty: expected model*.safetensors"),
        (generate("o/torn"), 1, "o/torn: the hub's model lacks a-00002-of-00002.gguf"),
        (["plan", "o/several:Q8_0"], 2, "m-Q8_0.gguf: version: expected 2 or 3"),
    ]
    for result, (_, code, message) in zip(hub.run(*(words for words, *_ in expected)), expected, strict=True):
        assert message in failure(result, code)


def test_without_a_network_or_offline(hub: Hub) -> None:
    """Only what was asked for before is there, whole."""
    fine(hub.run(PLAN, generate("o/several:Q4_K_M")))
    hub.close()
    names = ["o/never:Q4_0", "o/float", "o/several:Q8_0", "o/several/m-Q8_0.gguf", "o/several@v1"]
    commands = [generate(name) for name in names]
    has = "not in the hub's cache, which has m-Q4_K_M.gguf (0.3 MB); run again with a network"
    expected = ["o/never:Q4_0: no such directory, not in the hub's cache, and {}",
                "o/float: incomplete in the hub's cache", f"o/several:Q8_0: {has}", f"o/several/m-Q8_0.gguf: {has}",
                "o/several@v1: no such directory"]  # fmt: skip
    for offline, why in ((False, "the hub cannot be reached"), (True, "HF_HUB_OFFLINE is set")):
        *results, found, plan = hub.run(*commands, generate("o/several:Q4_K_M"), PLAN, offline=offline)
        for result, message in zip(results, expected, strict=True):
            assert message.format(why) in failure(result)
        assert found.code == plan.code == 0


def test_older_clients_know_of_no_files_but_the_caches() -> None:
    listing = hub_module._Listing({"m-Q4_0.gguf": 10**6, "a.json": 1}, "0" * 40, Path(), is_whole=False)
    with pytest.raises(RunError, match=r"^o/m@v1:Q8_0: not in the hub's cache, which has m-Q4_0.gguf \(1.0 MB\); run"):
        hub_module._choose(HubName("o/m", "v1", "Q8_0"), listing)
    with pytest.raises(RunError, match=r"^o/m: incomplete in the hub's cache: the model is missing; was"):
        hub_module._choose(HubName("o/m"), replace(listing, files={"a.json": 1}))


def test_a_gated_model_that_was_downloaded_still_opens(hub: Hub) -> None:
    fine(hub.run(generate("o/float")))
    hub.repositories["o/float"].gated = True
    fine(hub.run(generate("o/float")))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of three of the pieces of 10 MB in which the client writes a file."""
    model = make_checkpoint(tmp_path_factory.mktemp("big"), "llama3", **BIG)
    assert (model / "model.safetensors").stat().st_size > 30 * MB
    return model


def test_half_a_file_is_no_model(hub: Hub, big: Path) -> None:
    """What was whole before the interruption is not asked for again; older clients also keep the half."""
    hub.repositories["o/big"].commit(files_of(big))
    hub.interrupt(generate("o/big"), 25 * MB)
    [offline] = hub.run(generate("o/big"), offline=True)
    assert " is missing; was the download interrupted?" in failure(offline)
    hub.fetched()
    online = fine(hub.run(generate("o/big")))
    assert hub.fetched() == ["model.safetensors"]
    assert fine(hub.run(generate(str(big)), offline=True)) == online


def test_a_cut_connection_costs_a_piece(hub: Hub, big: Path) -> None:
    """The client asks for the rest at once, or its older versions when they are run again."""
    hub.repositories["o/big"].commit(files_of(big))
    hub.cuts_after = 24 * MB
    [result] = hub.run(generate("o/big"))
    if result.code:
        assert "o/big: download failed: " in failure(result)
        fine(hub.run(generate("o/big")))
    assert ("GET", "model.safetensors", f"bytes={20 * MB}-") in hub.requests
    assert hub.sent["model.safetensors"] == (big / "model.safetensors").stat().st_size + 4 * MB


@pytest.mark.parametrize(
    ("name", "lost"),
    [("o/float", SHARDS[1]), ("o/odd", "model-00002.safetensors"), (f"o/several/split/{PARTS[0]}", PARTS[2])],
)
def test_a_cache_that_lacks_a_file_is_incomplete(hub: Hub, name: str, lost: str) -> None:
    """Also where the client has not kept the list of files, as its older versions do not."""
    fine(hub.run(generate(name)))
    for place in (hub.cache / "hub").glob("models--*/trees"):
        shutil.rmtree(place)
    next(hub.cache.rglob(lost)).unlink()
    assert f"{lost} is missing" in failure(hub.run(generate(name), offline=True)[0])
    fine(hub.run(generate(name)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("the downloader's\nown"), "o/m@v1: download failed: the downloader's; run again to resume"),
        (OSError(28, "No space left on device"), "o/m@v1: the disk is full: "),
        (errors.HFValidationError("bad name"), "no such model"),
    ],
)
def test_other_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(_name: HubName) -> None:
        raise error

    monkeypatch.setattr(hub_module, "_list", fail)
    with pytest.raises(RunError) as caught:
        resolve("o/m@v1")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TestHeader:
    """The header of a GGUF is read in steps; a class stands for the client's files."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        asked = []

        class Files:
            def __init__(self, data: bytes) -> None:
                self.data = data

            def cat_file(self, _path: str, start: int, stop: int, **_options: Any) -> bytes:
                asked.append((start, stop))
                return self.data[start:stop]

        def read(data: bytes, step: int = 100) -> tuple[GgufFile, list[tuple[int, int]]]:
            monkeypatch.setattr(hub_module, "HfFileSystem", lambda: Files(data))
            monkeypatch.setattr(hub_module, "_HEADER_STEP", step)
            listing = hub_module._Listing({"sub/m.gguf": len(data)}, "0" * 40)
            return GgufFile(hub_module._header(HubName("o/m"), listing, "sub/m.gguf", tmp_path)), asked

        read.asked = asked  # type: ignore[attr-defined]
        return read

    @pytest.mark.parametrize("missing", [10, 20, None])  # bytes of the header after the first step
    @pytest.mark.parametrize(("model", "name"), [("one", "m.gguf"), ("several", f"split/{PARTS[0]}")])
    def test_its_end_is_found(
        self, read: Any, models: dict[str, dict[str, bytes]], tmp_path: Path, model: str, name: str, missing: int | None
    ) -> None:
        whole = tmp_path / "whole.gguf"
        whole.write_bytes(models[model][name])
        expected = GgufFile(whole)
        step = expected.header_bytes - missing if missing else 100
        file, asked = read(models[model][name], step)
        assert file.tensors == expected.tensors
        assert str(file.values) == str(expected.values)
        steps = asked
        if "rope_freqs.weight" in file.tensors:
            assert file.read("rope_freqs.weight").tobytes() == expected.read("rope_freqs.weight").tobytes()
            steps = asked[:-1]
        assert steps[0] == (0, step)
        assert all(stop == later for (_, stop), (later, _) in pairwise(steps))
        assert steps[-1][0] < file.header_bytes <= steps[-1][1]

    def test_a_damaged_one_is_refused(self, read: Any, models: dict[str, dict[str, bytes]]) -> None:
        data = models["one"]["m.gguf"]
        for damaged in (data[:3000], b"GGUF" + bytes(5000), b"no" * 1000):
            with pytest.raises(InputError):
                read(damaged)

    def test_an_endless_one_is_not_fetched(self, read: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A text of zeros is a valid text also where nothing was fetched yet."""
        monkeypatch.setattr(hub_module, "_LARGEST_HEADER", 4096)
        write_gguf(tmp_path / "long.gguf", {"a": "\0" * 50_000}, {}, iter([]))
        with pytest.raises(InputError, match=r"header: expected at most 4096 bytes"):
            read((tmp_path / "long.gguf").read_bytes(), 1000)
        assert read.asked[-1][1] < 2 * 4096
