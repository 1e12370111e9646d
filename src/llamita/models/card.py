"""Write the model card of a packed model: how it was made, how much was lost, and the licence's terms."""

import re
from dataclasses import dataclass
from pathlib import Path

from llamita.errors import LlamitaError
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import exists_in, read_bytes

_POLICIES = {
    "2": "https://ai.meta.com/llama/use-policy/",
    "3": "https://www.llama.com/llama3/use-policy/",
    "3.1": "https://www.llama.com/llama3_1/use-policy/",
    "3.2": "https://www.llama.com/llama3_2/use-policy/",
    "3.3": "https://www.llama.com/llama3_3/use-policy/",
}
_GUIDE = "https://www.llama.com/responsible-use-guide/"
_VERSION = re.compile(r"(?i)\bllama[ _-]?(2|3(?:[._][123])?)(?![\d.]*\d)")
_LICENCE_KEY = re.compile(r"^(license|license_name|license_link|language):[^\n]*(?:\n- [^\n]*)*$", re.MULTILINE)
_FARTHER = """
The method moves weights away from the nearest code on purpose, so that their errors cancel those of others.
These errors can be larger although the model is better.
"""


@dataclass(frozen=True)
class CardFacts:
    """Hold the facts of a card; sizes in bytes, errors as Σ(w - ŵ)² / Σw².

    Attributes:
        kinds: how many layers are stored in which way, from `layer_kinds.describe_kinds`.
        scales: how scales were chosen.
        is_measured: whether the method rounds by measured activations.
        remark: a further sentence, such as on the training data.
    """

    source_name: str
    source_path: Path
    scheme: QuantScheme
    kinds: str
    method: str
    scales: str
    is_measured: bool
    version: str
    source_bytes: int
    tensor_bytes: int
    relative_error: float | None  # None if the float model is not available
    worst: list[tuple[str, float]]
    remark: str | None = None


def model_card(facts: CardFacts) -> str:
    """Return the README.md of a packed model, with the front matter that the Hugging Face hub reads."""
    scheme = facts.scheme
    tables = {8: "int8 per channel", 4: "int4", None: "float, as in the source"}
    embedding = tables[scheme.kind("model.embed_tokens").bits]
    others = f"| linear layers by kind | {facts.kinds} |\n" if scheme.layers else ""
    before, after = facts.source_bytes / 1e6, facts.tensor_bytes / 1e6
    shrunk = f"; {before:,.1f} MB before (-{1 - after / before:.0%})"
    error = f"{facts.relative_error:.3e}" if facts.relative_error is not None else None
    if error is None:  # an imported model, which was as small before
        shrunk, error = "", "unknown: the float model was not available"
    return f"""{_front_matter(facts)}
# {_display_name(facts.source_name)}, 4-bit ({scheme.name})

llamita {facts.version} made this model from `{facts.source_name}`. Run it with `llamita chat DIRECTORY`.
{f"{chr(10)}{facts.remark}{chr(10)}" if facts.remark else ""}
| what | how |
|---|---|
| linear layers | int4, symmetric, one {scheme.scale_dtype} scale per group of {scheme.group_size} inputs |
| activations | int8, asymmetric, per token, at run time |
{others}| embedding and head | {embedding} |
| method | {facts.method} |
| scales | {facts.scales} |
| size of the tensors | {after:,.1f} MB{shrunk} |
| relative squared error of the weights | {error} |
{_worst(facts)}
`llamita verify DIRECTORY` checks every file against `llamita.json`.
`llamita evaluate DIRECTORY` measures what the rounding cost.
Rounding changes a model's answers: evaluate it for your use before you rely on it.
{_licence_notes(facts)}"""


def _worst(facts: CardFacts) -> str:
    """Return a table of the layers whose weights changed most, if they are known."""
    if not facts.worst:
        return ""
    rows = "\n".join(f"| {name} | {error:.2e} |" for name, error in facts.worst)
    return f"""
The layers whose weights changed most:

| layer | relative squared error |
|---|---|
{rows}
{_FARTHER if facts.is_measured else ""}"""


def _front_matter(facts: CardFacts) -> str:
    lines = ["---", "library_name: llamita", "tags:", "- 4-bit", "- w4a8", "- quantized"]
    hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:[@:].+|/.+\.gguf)?", facts.source_name)
    if hub and not Path(facts.source_name).exists():
        lines += [f"base_model: {hub[1]}", "base_model_relation: quantized"]
    card = _text(facts.source_path, "README.md")
    if card.startswith("---\n"):
        front = card.split("\n---", 1)[0]
        lines += [match[0] for match in _LICENCE_KEY.finditer(front)]
    return "\n".join([*lines, "---"])


def _display_name(source_name: str) -> str:
    return Path(source_name).name or "Llama"


def _licence_notes(facts: CardFacts) -> str:
    """Return Meta's terms for its Llama models and their derivatives."""
    if facts.source_name == "embedded":
        return ""
    version = llama_version(facts)
    policy = _POLICIES.get(version or "3.2", _POLICIES["3.2"])
    if version is None:
        opening = "If the base model is, or derives from, one of Meta's Llama models, these terms apply here too:"
    else:
        base = f"The base model is, or derives from, Meta's Llama {version}"
        opening = f"**Built with Llama.** {base}; its terms apply here:"
    return f"""
## Licence and responsible use

{opening}

- the licence and use policy of the base model, which are in this directory if the source had them;
- Meta's acceptable use policy: {policy}
- Meta's responsible use guide: {_GUIDE}

The card of the base model, if it had one, is `SOURCE_README.md`.
"""


def llama_version(facts: CardFacts) -> str | None:
    """Return the version of Meta's Llama that the source's licence, use policy or name gives, or None."""
    names = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice")
    texts = [_text(facts.source_path, name) for name in names] + [facts.source_name]
    found = next((match for text in texts if (match := _VERSION.search(text))), None)
    return found[1].replace("_", ".") if found else None


def _text(directory: Path, name: str) -> str:
    """Return a text file of the source, or an empty text if it is missing or cannot be read."""
    try:
        return read_bytes(directory, name).decode(errors="replace") if exists_in(directory, name) else ""
    except LlamitaError:
        return ""
