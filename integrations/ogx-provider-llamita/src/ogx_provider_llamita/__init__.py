"""llamita in OGX: `remote::llamita` uses a running server, `inline::llamita` runs one in OGX's own process."""

from typing import Any

from ogx_provider_llamita.config import LlamitaConfig, LlamitaInlineConfig


async def get_adapter_impl(config: LlamitaConfig, deps: dict[Any, Any]) -> Any:
    """Return the remote provider."""
    from ogx_provider_llamita.adapter import LlamitaAdapter  # late: OGX imports this package to list it, too

    adapter = LlamitaAdapter(config=config)
    await adapter.initialize()
    return adapter


async def get_provider_impl(config: LlamitaInlineConfig, deps: dict[Any, Any]) -> Any:
    """Return the inline provider with its models loaded."""
    from ogx_provider_llamita.inline import LlamitaInline

    provider = LlamitaInline(config=config)
    await provider.initialize()
    return provider
