"""What a configuration can say."""

from typing import Any

from ogx.providers.utils.inference.model_registry import RemoteInferenceProviderConfig
from ogx_api import json_schema_type
from pydantic import Field, HttpUrl


@json_schema_type
class LlamitaConfig(RemoteInferenceProviderConfig):
    """A running server."""

    base_url: HttpUrl = Field(default=HttpUrl("http://127.0.0.1:8080/v1"), description="Its address, with /v1.")

    @classmethod
    def sample_run_config(cls, **options: Any) -> dict[str, Any]:
        """Return the configuration that OGX writes into a new file."""
        return {"base_url": "${env.LLAMITA_URL:=http://127.0.0.1:8080/v1}", "api_key": "${env.LLAMITA_API_KEY:=}"}


@json_schema_type
class LlamitaInlineConfig(RemoteInferenceProviderConfig):
    """Models that OGX's process loads itself."""

    models: list[str] = Field(default=["embedded:llama3.2"], description="As `llamita serve` takes them.")

    @classmethod
    def sample_run_config(cls, **options: Any) -> dict[str, Any]:
        """Return the configuration that OGX writes into a new file."""
        return {"models": ["${env.LLAMITA_MODEL:=embedded:llama3.2}"]}
