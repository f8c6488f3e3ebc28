"""The streams, one to a file, and what they share.

`base` is the interface, `dispatching` delivers events to handlers for those streams that have
handlers, `runner` runs async functions over queued items, `sinks` turns whatever can take events
into a function. Import the classes from the package itself, or from `stream` and `async_stream`.
"""
