"""The stressed twin: the same function, and harder to round."""

import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

torch = pytest.importorskip("torch", reason="the twin is made with Torch")
transformers = pytest.importorskip("transformers", reason="the twin is made with transformers")
sys.path.insert(0, str(ROOT / "tools"))
from stress_embedded import calibration_tokens, fold_norms, stress  # noqa: E402

from llamita.evaluate.scores import Contender, score_text  # noqa: E402
from llamita.imports.open import resolve  # noqa: E402
from llamita.loading import load  # noqa: E402

EXACT = 1e-6  # nats a token: FP32 stores what float64 computed
TOKENS = 1024


@pytest.fixture(scope="module")
def embedded() -> tuple[Path, str]:
    path = resolve("embedded")
    return path, (path / "heldout.txt").read_text("utf-8")


def make_twin(embedded: tuple[Path, str], parts: set[str], out: Path) -> Path:
    path, text = embedded
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    stress(model, calibration_tokens(tokenizer, text), parts).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("parts", [{"basis"}, {"pairs"}, {"basis", "pairs"}], ids=["basis", "pairs", "both"])
def test_same_function_but_harder_to_round(embedded: tuple[Path, str], parts: set[str], tmp_path: Path) -> None:
    path, text = embedded
    twin = make_twin(embedded, parts, tmp_path / "twin")
    contenders = [
        Contender("float", load(path), True),
        Contender("twin", load(twin), False),
        Contender("rounded", load(path, scheme="llama3.2"), False),
        Contender("rounded twin", load(twin, scheme="llama3.2"), False),
    ]
    _, same, plain, stressed = score_text(contenders, text, chunk_tokens=TOKENS // 2, limit=2)
    assert same.kl is not None
    assert plain.kl is not None
    assert stressed.kl is not None
    assert same.kl.value < EXACT
    assert stressed.kl.value > 1.15 * plain.kl.value


def test_basis_puts_energy_into_few_channels(embedded: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = embedded
    twin = make_twin(embedded, {"basis"}, tmp_path / "twin")

    def spread(folder: Path) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        energy = model.model.embed_tokens.weight.detach().square().mean(0).numpy()
        return float(energy.max() / np.median(energy))

    assert spread(twin) > 3 * spread(path)


def test_folding_the_norms_keeps_the_function(embedded: tuple[Path, str]) -> None:
    path, text = embedded
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
    tokens = calibration_tokens(transformers.AutoTokenizer.from_pretrained(path), text)[:1, :64]
    with torch.no_grad():
        before = model(tokens).logits
        fold_norms(model)
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=1e-9)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)
