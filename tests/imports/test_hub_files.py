"""The choice of files from the list of all that a repository of the hub has."""

import pytest

from llamita.errors import InputError
from llamita.imports.hub_files import choose
from llamita.imports.names import parse_hub_name
from llamita.system.files import is_companion

MB = 10**6
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
COMPANIONS = ["LICENSE", "license.txt", "Licence.md", "Notice", "ACCEPTABLE_USE_POLICY.md", "COPYRIGHT",
              "use_policy.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "SOURCE_README.md"]  # fmt: skip
OTHERS = ["original/consolidated.00.pth", "optimizer.pt", "tokenizer.py", "onnx/model.safetensors", "x/config.json"]
PARTS = [f"sub/m-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
GGUFS = dict.fromkeys(["m-IQ4_XS.gguf", "m.Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-bf16.gguf", *PARTS], MB)
NO_MODELS = ["mmproj-F16.gguf", "m-mmproj-Q8_0.gguf", "m-imatrix.gguf"]


def chosen(name: str, files: object) -> list[str]:
    hub = parse_hub_name(name)
    assert hub is not None
    return choose(hub, dict.fromkeys(files, MB) if not isinstance(files, dict) else files).files  # type: ignore[call-overload]


def test_float_weights_come_with_what_travels_with_them() -> None:
    assert all(map(is_companion, COMPANIONS))
    wanted = [*SHARDS, "config.json", "llamita.json", "README.md", "model.safetensors.index.json", *COMPANIONS]
    bins = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert chosen("o/m", [*wanted, *OTHERS, *bins, *GGUFS]) == sorted(wanted)


def test_a_shard_that_the_list_lacks_is_still_wanted() -> None:
    assert chosen("o/m", ["config.json", SHARDS[1]]) == ["config.json", *SHARDS]


def test_pickles_come_where_there_are_no_safetensors() -> None:
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    wanted = ["config.json", *bins, "pytorch_model.bin.index.json"]
    assert chosen("o/m", [*wanted, *OTHERS, *GGUFS]) == wanted


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("o/m:Q4_K_M", ["m.Q4_K_M.gguf"]),
        ("o/m:q4_k_s", ["m-Q4_K_S.gguf"]),
        ("o/m:IQ4_XS", ["m-IQ4_XS.gguf"]),
        ("o/m:BF16", ["m-bf16.gguf"]),
        ("o/m:Q8_0", PARTS),
        ("o/m/m-bf16.gguf", ["m-bf16.gguf"]),
        (f"o/m/{PARTS[1]}", PARTS),
        ("o/m/mmproj-F16.gguf", ["mmproj-F16.gguf"]),  # whoever names it gets it, and the reader's error
    ],
)
def test_a_type_or_a_file_of_gguf(name: str, files: list[str]) -> None:
    assert chosen(name, [*GGUFS, *NO_MODELS, *OTHERS, "config.json"]) == files


def test_the_only_gguf_needs_no_name() -> None:
    assert chosen("o/m", [*PARTS, *NO_MODELS, "config.json"]) == PARTS
    assert chosen("o/m", ["m.gguf", *NO_MODELS]) == ["m.gguf"]


LIST = "IQ4_XS (1.0 MB), Q4_K_S (1.0 MB), BF16 (1.0 MB), Q4_K_M (1.0 MB), Q8_0 (3.0 MB)"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("o/m", GGUFS, f"o/m: expected one GGUF, got {LIST}; write o/m:Q4_K_M"),
        *(
            (f"o/m@v1:{kind}", GGUFS, f"o/m@v1:{kind}: expected one such GGUF, got {LIST}; write o/m@v1:Q4_K_M")
            for kind in ("Q4_K", "Q4_XS", "F16", "Q4_0")
        ),
        (
            "o/m:Q4_0",
            ["a-Q4_0.gguf", "b-Q4_0.gguf", "c-Q8_0.gguf"],
            "o/m:Q4_0: expected one such GGUF, got a-Q4_0.gguf (1.0 MB), b-Q4_0.gguf (1.0 MB); write o/m/b-Q4_0.gguf",
        ),
        ("o/m", ["a.gguf", "b\x1b.gguf"], r"a.gguf (1.0 MB), b\x1b.gguf (1.0 MB); write o/m/b\x1b.gguf"),
        ("o/m/c.gguf", ["a.gguf"], "o/m/c.gguf: expected a file of the hub's model, got a.gguf (1.0 MB)"),
        (
            "o/m",
            ["config.json", *OTHERS, *NO_MODELS],
            "o/m: expected model*.safetensors, pytorch_model*.bin or a .gguf",
        ),
        ("o/m:Q4_0", ["model.safetensors"], "o/m: expected model*.safetensors, pytorch_model*.bin or a .gguf"),
    ],
)
def test_what_is_there_is_listed(name: str, files: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(name, files)
    assert message in str(caught.value)


def test_a_long_list_is_cut() -> None:
    with pytest.raises(InputError, match=r"m040\.gguf \(1\.0 MB\), 60 more; write o/m/m100\.gguf"):
        chosen("o/m", [f"m{n:03}.gguf" for n in range(1, 101)])
