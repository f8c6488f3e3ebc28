"""What tests of asynchronous code need: virtual time, proof that nothing leaks, faults on purpose.

- `run` runs a coroutine in virtual time and fails it if it leaves anything behind.
- `VirtualTimeLoop` is the loop it runs on: waiting takes no time, and timers are exact.
- `cancel_at_every_await` cancels a scenario everywhere it can be cancelled.
- `FaultySocket` stalls, fails or takes its time where a WebSocket would send.

The pytest plugin `codomyrmex.events.streaming.testing.plugin` runs `async def` tests this way. Only
the standard library is needed, and pytest for the plugin.
"""

from .faults import FaultySocket, cancel_at_every_await
from .leaks import LeakError, run
from .virtual_time import DeadlockError, VirtualTimeLoop

__all__ = [
    "DeadlockError",
    "FaultySocket",
    "LeakError",
    "VirtualTimeLoop",
    "cancel_at_every_await",
    "run",
]
