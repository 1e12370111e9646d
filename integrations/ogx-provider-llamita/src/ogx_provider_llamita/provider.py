"""What OGX imports first: the providers of this package."""

from ogx_api import Api, InlineProviderSpec, ProviderSpec, RemoteProviderSpec


def get_provider_spec() -> list[ProviderSpec]:
    """Return both providers; OGX takes the one whose type stands in the configuration."""
    return [
        RemoteProviderSpec(
            api=Api.inference,
            adapter_type="llamita",
            provider_type="remote::llamita",
            module="ogx_provider_llamita",
            config_class="ogx_provider_llamita.config.LlamitaConfig",
            description="A server started by `llamita serve`.",
        ),
        InlineProviderSpec(
            api=Api.inference,
            provider_type="inline::llamita",
            module="ogx_provider_llamita",
            config_class="ogx_provider_llamita.config.LlamitaInlineConfig",
            description="llamita's engine in OGX's own process.",
        ),
    ]
