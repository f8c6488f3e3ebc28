"""The streams with handlers: `Stream`, `InMemoryStream`, `SSEStream`, `TopicStream`, `broadcast`.

Each lives in a file of its own under `streams`.
"""

from .streams.base import Stream, StreamStatistics
from .streams.memory import InMemoryStream
from .streams.sinks import broadcast
from .streams.sse import SSEStream
from .streams.topic import TopicStream

__all__ = [
    "InMemoryStream",
    "SSEStream",
    "Stream",
    "StreamStatistics",
    "TopicStream",
    "broadcast",
]
