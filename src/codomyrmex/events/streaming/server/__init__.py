"""A hub as a program: `serve` starts one, with the measurements of its machine as live data.

Needs the extra `server`. This is the only room that knows the inside of uvicorn; to mount a hub
in an application of one's own, `hub` is enough.
"""

from .host_metrics import HostMetrics
from .serve import serve

__all__ = ["HostMetrics", "serve"]
