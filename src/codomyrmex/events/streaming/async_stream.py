"""The streams with tasks of their own: `AsyncStream`, `WebSocketStream`, `BatchingStream`.

Each lives in a file of its own under `streams`.
"""

from .streams.batching import BatchingStream
from .streams.buffered import AsyncStream
from .streams.websocket import WebSocketStream

__all__ = ["AsyncStream", "BatchingStream", "WebSocketStream"]
