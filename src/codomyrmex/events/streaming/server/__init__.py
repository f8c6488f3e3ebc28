"""A hub as a program: `serve` starts one, with the measurements of its machine as live data.

Needs the extra `server`. This is the only room that knows the inside of uvicorn; to mount a hub
in an application of one's own, `hub` is enough. `HubServer` runs such an application so that a
stop does not wait for the readers of its streams.
"""

from ..errors import MissingExtra

try:
    from .host_metrics import HostMetrics
    from .hub_server import HubServer
    from .serve import serve
except ModuleNotFoundError as error:
    if (error.name or "").startswith("codomyrmex"):
        raise
    raise MissingExtra("codomyrmex.events.streaming.server", "server") from error

__all__ = ["HostMetrics", "HubServer", "serve"]
