"""The sizes of what a chain of methods makes of a model, before anything is read."""

from collections.abc import Callable
from typing import Any

from llamita.methods.chain import Chain
from llamita.models.config import ModelConfig
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.sizes import Plan, float_bytes, make_plan
from llamita.numerics.scheme import QuantScheme


def plan_chain(
    config: ModelConfig, scheme: QuantScheme, float_dtype: Callable[[str], str], chain: Chain, settings: dict[str, Any]
) -> Plan:
    """As `make_plan`, for what the chain's transforms make of a model of this shape."""
    changed, transform = chain.shape(config, settings)

    def dtype(name: str) -> str:
        return float_dtype(f"{EMBEDDING}.weight" if config.tied and name == f"{HEAD}.weight" else name)

    before = float_bytes(config, float_dtype)
    return make_plan(changed, scheme, dtype, transform=transform, source_bytes=before)
