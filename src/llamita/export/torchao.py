"""Export safetensors with torchao's own tensors, for transformers with torchao (`--to torchao`).

Codes are a byte each, scales float32, in the tensors that torchao calls IntxUnpackedToInt8Tensor. Activations are int8
per token. A tied int8 table becomes two.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, MappingType, PerGroup
from transformers import TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from llamita.export.empty_llama import empty_llama, put
from llamita.export.in_transformers import prove
from llamita.export.job import ExportJob
from llamita.export.program import INT4, tensor_of
from llamita.export.source import module_names, refuse_rotation
from llamita.imports.torchao import PER_TOKEN
from llamita.models.names import EMBEDDING, HEAD, vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.models.weights import Int8Weight
from llamita.system.progress import Progress
from llamita.system.staging import flush_files


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory.

    Raises:
        InputError: the model needs a rotation at run time.
    """
    packed = job.packed
    refuse_rotation(packed, "torchao")
    table = packed.weight(EMBEDDING)
    unties = packed.config.tied and isinstance(table, Int8Weight)
    llama = empty_llama(packed, tie_word_embeddings=packed.config.tied and not unties, dtype=torch.float32)
    names = module_names(packed)
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        activations = None if name == EMBEDDING else PER_TOKEN  # no activation is multiplied by the embedding
        put(llama, f"{name}.weight", _parameter(tensor_of(packed.weight(name), activations)))
    if unties:
        put(llama, f"{HEAD}.weight", _parameter(tensor_of(table, PER_TOKEN)))
    for name in vector_names(packed.config):
        put(llama, name, _parameter(torch.from_numpy(np.array(packed.vector(name)))))
    if llama.config.tie_word_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    _mark(llama, packed)
    transformers.utils.logging.disable_progress_bar()
    llama.save_pretrained(directory)
    companions = find_companions(packed.path)
    for name in companions.values():
        (directory / name).unlink(missing_ok=True)  # transformers writes other versions of some
    copy_companions(packed.path, directory, companions)
    flush_files(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    grown = packed.config.vocab_size * packed.config.hidden_size if unties else 0
    return {"bytes": size, "untied_bytes": grown, "proof": prove(packed, directory).to_dict()}


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _mark(llama: Any, packed: PackedModel) -> None:
    """Write into the configuration what transformers needs to read the tensors back."""
    assert packed.scheme is not None
    how = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4, weight_granularity=PerGroup(packed.scheme.group_size),
        weight_mapping_type=MappingType.SYMMETRIC,
    )  # fmt: skip
    llama.config.quantization_config = TorchAoConfig(how, include_input_output_embeddings=True)
    llama.hf_quantizer = AutoHfQuantizer.from_config(llama.config.quantization_config, pre_quantized=False)
