"""The provider: OGX's mixin for servers of OpenAI's API, told where ours is."""

import httpx2
from ogx.providers.utils.inference.openai_mixin import OpenAIMixin
from ogx_api import HealthResponse, HealthStatus

from ogx_provider_llamita.config import LlamitaConfig

_HEALTH_SECONDS = 3


class LlamitaAdapter(OpenAIMixin):
    """Sends requests to a server of llamita's."""

    config: LlamitaConfig

    def get_base_url(self) -> str:
        """Return the server's address."""
        return str(self.config.base_url)

    def get_api_key(self) -> str:
        """Return the key; OGX wants one even for a server that needs none."""
        return super().get_api_key() or "none"

    async def health(self) -> HealthResponse:
        """Ask the server whether its engine moves."""
        address = f"{self.get_base_url().rstrip('/')}/health"
        try:
            async with httpx2.AsyncClient(timeout=_HEALTH_SECONDS) as client:
                response = await client.get(address)
        except httpx2.HTTPError as error:
            return HealthResponse(status=HealthStatus.ERROR, message=f"{address}: {error!r}")
        if response.status_code == 200:
            return HealthResponse(status=HealthStatus.OK)
        return HealthResponse(status=HealthStatus.ERROR, message=f"{address}: {response.text[:200]}")
