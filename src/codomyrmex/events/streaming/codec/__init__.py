"""Bytes to values and frames, and back: no I/O, no clock, no asyncio; knows frames, not `Event`."""
