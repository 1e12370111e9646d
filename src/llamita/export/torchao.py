"""`--to torchao`: safetensors with torchao's own tensors, for transformers with torchao.

Codes are int8 on float32 scales, a byte for each, in the tensors that torchao calls
IntxUnpackedToInt8Tensor; activations are int8 per token. A tied int8 table comes apart.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, MappingType, PerGroup
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from llamita.export.in_transformers import prove
from llamita.export.job import ExportJob
from llamita.export.program import INT4, codes_tensor
from llamita.export.source import Weight, module_names, refuse_online, transformers_keys
from llamita.models.names import EMBEDDING, HEAD, vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.models.weights import Int8Weight
from llamita.numerics.affine import to_f32
from llamita.system.progress import Progress
from llamita.system.staging import flush_files


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory.

    Raises:
        InputError: the model needs a rotation at run time.
    """
    packed = job.packed
    refuse_online(packed, "torchao")
    table = packed.weight(EMBEDDING)
    unties = packed.config.tied and isinstance(table, Int8Weight)
    config = _config(packed, unties)
    with torch.device("meta"):
        llama: Any = LlamaForCausalLM(config)
    names = module_names(packed)
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        _set(llama, f"{name}.weight", _tensor(name, packed.weight(name)))
    if unties:
        _set(llama, f"{HEAD}.weight", _tensor(HEAD, table))
    for name in vector_names(packed.config):
        _set(llama, name, torch.from_numpy(np.array(packed.vector(name))))
    if config.tie_word_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    _mark(llama, packed)
    transformers.utils.logging.disable_progress_bar()
    llama.save_pretrained(directory)
    companions = find_companions(packed.path)
    for name in companions.values():
        (directory / name).unlink(missing_ok=True)  # transformers writes some of its own
    copy_companions(packed.path, directory, companions)
    flush_files(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    grown = packed.config.vocab_size * packed.config.hidden_size if unties else 0
    return {"bytes": size, "untied_bytes": grown, "proof": prove(packed, directory).to_dict()}


def _config(packed: PackedModel, unties: bool) -> LlamaConfig:
    tied = packed.config.tied and not unties
    return LlamaConfig(**{**transformers_keys(packed), "tie_word_embeddings": tied, "dtype": torch.float32})


def _tensor(name: str, weight: Weight) -> Tensor:
    if isinstance(weight, np.ndarray):
        return torch.from_numpy(np.array(to_f32(weight)))
    return codes_tensor(weight) if name != EMBEDDING else codes_tensor(weight, None)  # no activation meets it


def _set(llama: nn.Module, name: str, values: Tensor) -> None:
    module, _, own = name.rpartition(".")
    setattr(llama.get_submodule(module), own, nn.Parameter(values, requires_grad=False))


def _mark(llama: Any, packed: PackedModel) -> None:
    """What transformers has to know to read the tensors back."""
    assert packed.scheme is not None
    how = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4, weight_granularity=PerGroup(packed.scheme.group_size),
        weight_mapping_type=MappingType.SYMMETRIC,
    )  # fmt: skip
    llama.config.quantization_config = TorchAoConfig(how, include_input_output_embeddings=True)
    llama.hf_quantizer = AutoHfQuantizer.from_config(llama.config.quantization_config, pre_quantized=False)
