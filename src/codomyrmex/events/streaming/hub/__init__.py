"""The hub: an ASGI application that takes events in over HTTP and streams them out.

`Hub` is the application. What is inside it, one matter to a file: `http.py` requests, answers
and refusals; `hosts.py` who may talk to it, by `Host` and `Origin`; `publish.py`, `subscribe.py`
and `websocket.py` the endpoints; `connection.py` one streaming answer, which nothing holds up;
`assets.py` and `page/` the live page. Nothing here needs more than the standard library.
"""

from .app import Hub
from .authorize import everyone

__all__ = ["Hub", "everyone"]
