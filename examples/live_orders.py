"""A page that is live: `uvicorn live_orders:app`, open it, and order something.

curl -X POST 'http://127.0.0.1:8000/orders/42?state=paid'
"""

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from codomyrmex.events.streaming import Hub

hub = Hub(anonymous=True, public="orders.*")
app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)


@app.post("/orders/{number}")
async def order(number: int, state: str) -> None:
    await hub.publish(f"orders.{number}", f"order {number} is {state}")


@app.get("/", response_class=HTMLResponse)
def page() -> str:
    return """<link rel=icon href="data:,"><h1>Orders</h1><ul id="list"></ul><script>
      new EventSource("/live/events?topic=orders.*&last=20").onmessage = ({data}) =>
        list.prepend(Object.assign(document.createElement("li"), {textContent: JSON.parse(data)}))
    </script>"""
