"""The models that a server offers, by name: loaded models, and each with one of its adapters."""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llamita.engine.llm import LLM
from llamita.engine.sampler import Sampling
from llamita.models.names import expected_tensors
from llamita.serve.errors import no_model
from llamita.serve.structure import Structure
from llamita.text.chat_template import find_template
from llamita.text.tokenizer import read_settings


@dataclass(frozen=True)
class Served:
    """A name that a request can give.

    Attributes:
        id: the name: NAME of a model, NAME:ADAPTER of one with an adapter.
        llm: the loaded model.
        adapter: the adapter's name, None for the model alone.
        parent: the id of the model alone, None for that itself.
        created: seconds since 1970 of the model's files; the same after a restart.
        has_chat: the model has a chat template.
        description: what `/v1/models` says beside it.
        structure: makes the model's grammars.
    """

    id: str
    llm: LLM
    adapter: str | None
    parent: str | None
    created: int
    has_chat: bool
    description: dict[str, Any]
    structure: Structure

    @cached_property
    def fingerprint(self) -> str:
        """What tells a client that the model's files have changed."""
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.llm.path.iterdir())
        return f"llamita-{hashlib.sha256(repr((self.id, self.description['scheme'], files)).encode()).hexdigest()[:12]}"

    def entry(self) -> dict[str, Any]:
        """Return the model's object of OpenAI's API."""
        entry = {"id": self.id, "object": "model", "created": self.created, "owned_by": "llamita"}
        return {**entry, "parent": self.parent, "max_model_len": self.llm.context, "meta": self.description}


class Models:
    """All names of a server. The first is what a request without `model` gets.

    Args:
        llms: loaded models by name.
    """

    def __init__(self, llms: dict[str, LLM]) -> None:
        self.llms = llms
        self._bases = {name: _describe(name, llm) for name, llm in llms.items()}

    @property
    def all(self) -> list[Served]:
        """Every name, each model followed by its adapters."""
        found = []
        for name, base in self._bases.items():
            found.append(base)
            for adapter in list(base.llm.adapters):
                found.append(_with_adapter(base, name, adapter))
        return found

    def find(self, name: str | None) -> Served:
        """Return the model of a name; None is the first.

        Raises:
            ApiError: 404, there is no such model.
        """
        if name is None:
            return next(iter(self._bases.values()))
        if name in self._bases:
            return self._bases[name]
        base, _, adapter = name.rpartition(":")
        if base in self._bases and adapter in self._bases[base].llm.adapters:
            return _with_adapter(self._bases[base], base, adapter)
        raise no_model(name, [served.id for served in self.all])


def _with_adapter(base: Served, name: str, adapter: str) -> Served:
    return replace(base, id=f"{name}:{adapter}", adapter=adapter, parent=name)


def _describe(name: str, llm: LLM) -> Served:
    config, created = llm.config, int((llm.path / "config.json").stat().st_mtime)
    sampling = Sampling.from_generation_config(read_settings(llm.path, "generation_config.json"))
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    description = {
        "n_ctx": llm.context,
        "n_ctx_train": config.context,
        "n_params": sum(math.prod(shape) for shape in expected_tensors(config).values()),
        "n_vocab": config.vocab_size,
        "size": _weight_bytes(llm.path),
        "scheme": None if llm.scheme is None else f"{llm.scheme.name}, groups of {llm.scheme.group_size}",
        "kv_dtype": llm.kv_dtype,
        "float_math": llm.float_math,
        "has_chat": "role" in (find_template(llm.path) or ""),  # that of `embedded` only joins what is said
        "sampling": {n: getattr(sampling, n) for n in names},
    }
    return Served(name, llm, None, None, created, description["has_chat"], description, Structure(llm))


def _weight_bytes(directory: Path) -> int | None:
    """Return the bytes of a model's weight files; None for a GGUF, which is elsewhere."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) or None
