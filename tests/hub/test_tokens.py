"""Access tokens: which are accepted, where keys come from, and what a hub makes of them."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from codomyrmex.events.streaming.codec.sse import Decoder
from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.hub import keys as keys_module
from codomyrmex.events.streaming.hub.keys import Keys, keys_of
from codomyrmex.events.streaming.hub.tokens import DETAIL, InvalidToken, Tokens, make_token
from tests.hub.conftest import CurrentHub
from tests.hub.serving import PATIENCE, ServedUrl, error_of, open_hub

SECRET = "a secret of at least sixty-four bytes, so that it is enough for any" * 2
ISSUER, HUB = "https://issuer.example", "https://hub.example/live"
NAMES: dict[str, Any] = {"issuer": ISSUER, "audience": HUB}


NOTHING = {"type": DETAIL, "actions": [], "topics": []}


def pem(key: Any) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()  # type: ignore[no-any-return]


def public_pem(key: Any) -> str:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public.decode()  # type: ignore[no-any-return]


KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def jwk(name: str, kid: str = "1", **more: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name(name)
    value: Any = algorithm.to_jwk(KEYS[name].public_key())
    return {**json.loads(value), "kid": kid, **more}


def check(text: str, keys: str | list[str] = SECRET, **options: Any) -> Any:
    return asyncio.run(Tokens(keys, **{**NAMES, **options}).check(text))


def made(**claims: Any) -> str:
    """A token as it should be, but for what is said here; None: that is missing."""
    now = int(time.time())
    said = {"iss": ISSUER, "aud": HUB, "exp": now + 86_400, "iat": now, "sub": "ada", **claims}
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, SECRET, "HS256", {"typ": "at+jwt"})


class TestWhatIsAccepted:
    @pytest.mark.parametrize("name", KEYS)
    def test_what_was_signed_with_the_key(self, name: str) -> None:
        text = make_token(pem(KEYS[name]), subject="ada", subscribe=["orders.*"], **NAMES)
        for known in (public_pem(KEYS[name]), pem(KEYS[name]), json.dumps(jwk(name))):
            token = check(text, known)
            assert token.subject == "ada"
            assert token.allows("subscribe", "orders.1")
            assert not token.allows("subscribe", "other")
            assert not token.allows("publish", "orders.1")

    def test_a_secret(self) -> None:
        text = make_token(SECRET, publish=["a", "b.>"], lifetime=60, **NAMES)
        token = check(text)
        assert token.subject is None
        assert token.allows("publish", "b.1.2")
        assert 50 < token.expires - time.time() <= 60

    def test_one_of_several_keys(self) -> None:
        text = make_token(pem(KEYS["EdDSA"]), **NAMES)
        sources = [SECRET, public_pem(KEYS["RS256"]) + public_pem(KEYS["EdDSA"])]
        assert check(text, sources).grants == []

    def test_several_audiences_and_types(self) -> None:
        assert check(made(aud=["https://other.example", HUB])).subject == "ada"
        headers = {"typ": "Application/AT+JWT"}
        text = jwt.encode(
            {"iss": ISSUER, "aud": HUB, "exp": time.time() + 9}, SECRET, "HS256", headers
        )
        assert check(text).subject is None

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "no JSON Web Token"),
            ("x", "no JSON Web Token"),
            ("a.b.c", "no JSON Web Token"),
            ("x" * 70_000, "too long"),
            (made() + "x", "no key that is known"),
            (made(exp=None), "exp"),
            (made(exp=int(time.time()) - 1), "expired"),
            (made(exp="never"), "exp"),
            (made(nbf=int(time.time()) + 3600), "not yet valid"),
            (made(iss="https://evil.example"), "issuer"),
            (made(iss=None), "iss"),
            (made(aud="https://other.example"), "udience"),
            (made(aud=None), "aud"),
            (made(sub=7), "sub"),
            (made(iat="1"), "at"),
            ("eyJhbGciOlsieCJdfQ.e30.eA", "is not accepted"),
            (jwt.encode({"exp": 1}, SECRET, "HS256"), "at+jwt"),
            (jwt.encode({"exp": 1}, SECRET, "HS384", {"typ": "at+jwt"}), "'HS384' is not accepted"),
            (jwt.encode({}, "", "none", {"typ": "at+jwt"}), "'none' is not accepted"),
            (jwt.encode({}, SECRET, "HS256", {"typ": "at+jwt", "kid": "x"}), "exp"),
            (jwt.encode({}, "y" * 40, "HS256", {"typ": "at+jwt", "jwk": {}}), "no key"),
            (made(authorization_details={}), "an array"),
            (made(authorization_details=[{}] * 101), "up to 100"),
            (made(authorization_details=["x"]), "an object with a type"),
            (made(authorization_details=[{"type": DETAIL}]), "actions"),
            (
                made(authorization_details=[{"type": DETAIL, "actions": [1], "topics": []}]),
                "actions",
            ),
            (made(authorization_details=[{"type": DETAIL, "actions": [], "topics": 1}]), "topics"),
            (
                made(authorization_details=[{"type": DETAIL, "actions": [], "topics": ["x"]}]),
                "a topic is an object",
            ),
            (
                made(
                    authorization_details=[
                        {"type": DETAIL, "actions": [], "topics": [], "payload": "x"}
                    ]
                ),
                "payload",
            ),
        ],
    )
    def test_what_is_not(self, text: str, reason: str) -> None:
        with pytest.raises(InvalidToken) as caught:
            check(text)
        assert reason in str(caught.value)

    @pytest.mark.parametrize(
        ("topic", "reason"),
        [
            ({"match": "a", "match_type": "regexp"}, "no match type 'regexp'"),
            ({"match": "(", "match_type": "urlpattern"}, "tokenizer error"),
            ({"match": "", "match_type": "pattern"}, "at least one character"),
            ({"match": "x" * 4097}, "4096 bytes"),
            ({"match": 1}, "a topic is an object"),
            ({"match": "a", "match_type": 1}, "a topic is an object"),
        ],
    )
    def test_topics_that_cannot_be_make_the_whole_token_invalid(
        self, topic: dict[str, Any], reason: str
    ) -> None:
        details = [{"type": DETAIL, "actions": ["subscribe"], "topics": [{"match": "a"}, topic]}]
        with pytest.raises(InvalidToken, match=reason):
            check(made(authorization_details=details))

    def test_a_hundred_topics_and_no_more(self) -> None:
        topics = [{"match": f"t{number}"} for number in range(100)]
        detail = {"type": DETAIL, "actions": ["subscribe"], "topics": topics}
        assert check(made(authorization_details=[detail])).allows("subscribe", "t99")
        more = {**detail, "topics": [{"match": "another"}]}
        with pytest.raises(InvalidToken, match="100 topics"):
            check(made(authorization_details=[detail, more]))

    def test_details_of_others_and_actions_that_are_not_known_mean_nothing(self) -> None:
        details = [
            {"type": "https://other.example/detail", "actions": 1},
            {"type": DETAIL, "actions": ["dance", "publish"], "topics": [{"match": "a"}]},
        ]
        token = check(made(authorization_details=details))
        assert token.allows("publish", "a")
        assert not token.allows("dance", "a")

    @pytest.mark.parametrize(
        ("match", "kind", "topic", "expected"),
        [
            ("*", "exact", "anything", True),
            ("*", "urlpattern", "anything", True),
            ("a.*", "exact", "a.b", False),
            ("a.*", "exact", "a.*", True),
            ("https://e.com/books/:id", "urlpattern", "https://e.com/books/1", True),
            ("https://e.com/books/:id", "urlpattern", "https://E.COM/books/1", True),
            ("https://e.com/books/:id", "urlpattern", "https://e.com/Books/1", False),
            ("https://e.com/books/:id", "urlpattern", "https://e.com/books/1/2", False),
            ("https://e.com/books/:id", "urlpattern", "not a url", False),
            ("/books/:id", "urlpattern", "https://hub.example/books/1", True),
            ("/books/:id", "urlpattern", "/books/1", True),
            ("/books/:id", "urlpattern", "https://other.example/books/1", False),
        ],
    )
    def test_which_topics_are_meant(
        self, match: str, kind: str, topic: str, expected: bool
    ) -> None:
        topics = [{"match": match, "match_type": kind}]
        details = [{"type": DETAIL, "actions": ["subscribe"], "topics": topics}]
        assert check(made(authorization_details=details)).allows("subscribe", topic) is expected

    def test_a_pattern_costs_no_more_than_its_length(self) -> None:
        topics = [{"match": "https://e.com/:a(a*a*a*a*a*a*a*a*a*a*b)", "match_type": "urlpattern"}]
        details = [{"type": DETAIL, "actions": ["subscribe"], "topics": topics}]
        token = check(made(authorization_details=details))
        begin = time.perf_counter()
        assert not token.allows("subscribe", "https://e.com/" + "a" * 1000)
        assert time.perf_counter() - begin < 0.5


class TestKeys:
    def test_a_public_key_is_no_secret(self) -> None:
        """Key confusion: a token signed with the public key, which everybody has."""
        public = public_pem(KEYS["RS256"])
        head = {"typ": "at+jwt", "alg": "HS256"}
        claims = {"iss": ISSUER, "aud": HUB, "exp": time.time() + 60}

        def encoded(value: bytes) -> bytes:
            return base64.urlsafe_b64encode(value).rstrip(b"=")

        signed = b".".join(encoded(json.dumps(part).encode()) for part in (head, claims))
        signature = hmac.digest(public.encode(), signed, hashlib.sha256)
        forged = b".".join((signed, encoded(signature))).decode()
        with pytest.raises(InvalidToken, match="no key that is known"):
            check(forged, public)

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("too short", "at least 32 bytes"),
            ("{", "neither JSON Web Keys nor a secret"),
            ("{}", "no key that can be used"),
            ('{"keys": []}', "no key that can be used"),
            ('{"kty": "oct", "k": "AAAA"}', "no key that can be used"),
            ("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----", "cannot be read"),
            ("env:NO_SUCH_VARIABLE", "env:NO_SUCH_VARIABLE: 'NO_SUCH_VARIABLE' is not set"),
            ("file:/no/such/file", "file:/no/such/file"),
            ("http://keys.example/jwks", "over https"),
            (pem(ec.generate_private_key(ec.SECP384R1())), "RSA, P-256 or Ed25519"),
            (public_pem(rsa.generate_private_key(65537, 1024)), "at least 2048 bits"),
        ],
    )
    def test_what_cannot_be_a_key_is_said_without_it(self, source: str, reason: str) -> None:
        with pytest.raises(ValueError) as caught:
            Tokens(source, **NAMES)
        assert reason in str(caught.value)

    def test_of_a_set_what_can_be_used(self, caplog: pytest.LogCaptureFixture) -> None:
        keys = [
            jwk("RS256", "signs"),
            jwk("ES256", "encrypts", use="enc"),
            jwk("ES256", "other", alg="ES384"),
            {"kty": "oct", "k": "A" * 64, "kid": "secret"},
        ]
        found = keys_of(json.dumps({"keys": keys}), is_secret=False)
        assert [key.id for key in found] == ["signs"]
        assert "everybody can read" in caplog.text
        assert {key.id for key in keys_of(json.dumps({"keys": keys}))} == {"signs", "secret"}

    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HUB_KEY", SECRET)
        tokens = Tokens("env:HUB_KEY", **NAMES)
        assert asyncio.run(tokens.check(made())).subject == "ada"
        monkeypatch.setenv("HUB_KEY", "y" * 40)
        tokens.reload()
        with pytest.raises(InvalidToken):
            asyncio.run(tokens.check(made()))
        monkeypatch.setenv("HUB_KEY", "short")
        with pytest.raises(ValueError, match="32 bytes"):
            tokens.reload()

    def test_a_file_is_read_again_when_it_has_changed(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(keys_module, "_LOOK", 0.0)
        path = tmp_path / "key"
        path.write_text("y" * 40)
        tokens = Tokens(f"file:{path}", **NAMES)
        with pytest.raises(InvalidToken):
            asyncio.run(tokens.check(made()))
        path.write_text(SECRET + "\n")
        assert asyncio.run(tokens.check(made())).subject == "ada"
        path.write_text("short")
        assert asyncio.run(tokens.check(made())).subject == "ada"
        path.unlink()
        assert asyncio.run(tokens.check(made())).subject == "ada"
        assert caplog.text.count("the keys that are known are used on") == 2


class Published:
    """Keys behind a URL."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0

    @contextmanager
    def serve(self) -> Iterator[str]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(json.dumps({"keys": outer.keys}).encode())

            def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - as in the base
                pass

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/jwks.json"
            finally:
                server.shutdown()
                thread.join()


@pytest.mark.real_time
class TestKeysOfAUrl:
    async def test_are_read_when_they_are_needed_and_again_for_a_key_that_is_new(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        published = Published()
        published.keys = [jwk("ES256", "old")]
        old, new = (
            make_token(pem(KEYS[name]), kid=kid, **NAMES)
            for name, kid in (("ES256", "old"), ("EdDSA", "new"))
        )
        with published.serve() as url:
            tokens = Tokens(url, **NAMES)
            assert published.asked == 0
            await asyncio.gather(*(tokens.check(old) for _ in range(20)))
            assert published.asked == 1
            published.keys = [jwk("EdDSA", "new")]
            with pytest.raises(InvalidToken):
                await tokens.check(new)  # too soon to ask again
            monkeypatch.setattr(keys_module, "_PAUSE", 0.0)
            await tokens.check(new)
            assert published.asked == 2
            published.status = 500
            with pytest.raises(InvalidToken):
                await tokens.check(old)
            await tokens.check(new)
            assert "the keys that are known are used on" in caplog.text
            published.status = 200
            tokens.reload()
            await tokens.check(new)

    async def test_too_many_bytes_are_not_read(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(keys_module, "_MOST_BYTES", 100)
        published = Published()
        published.keys = [jwk("ES256", "old")]
        with published.serve() as url:
            assert await Keys(url).find(None, "ES256") == []
        assert "too large" in caplog.text


@pytest.fixture
def hub() -> Hub:
    return Hub(
        tokens=Tokens(SECRET, cookie="token", **NAMES),
        anonymous=True,
        allowed_origins=["https://friend.example"],
    )


def bearer(**options: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_token(SECRET, **NAMES, **options)}"}


class TestAtTheHub:
    def test_a_token_says_what_its_bearer_may_do(
        self, client: httpx.Client, url: ServedUrl, hub: Hub
    ) -> None:
        url.run(hub.publish("orders.1", "private"))
        url.run(hub.publish("orders.1", "public", public=True))
        reader = bearer(subscribe=["orders.*"])
        page = client.get("/events/orders.*/history", headers=reader).json()
        assert [event["data"] for event in page["events"]] == ["private", "public"]
        page = client.get("/events/orders.*/history").json()
        assert [event["data"] for event in page["events"]] == ["public"]
        assert client.post("/events/orders.1", content="1", headers=reader).status_code == 403
        writer = bearer(publish=["orders.*"])
        assert client.post("/events/orders.1", content="1", headers=writer).status_code == 201
        assert client.post("/events/orders.1", content="1").status_code == 403

    def test_one_that_is_not_accepted_is_told_why(self, client: httpx.Client) -> None:
        expired = {"Authorization": f"Bearer {make_token(SECRET, lifetime=-1, **NAMES)}"}
        answer = client.get("/events?topic=a", headers=expired)
        assert answer.status_code == 401
        challenge = answer.headers["www-authenticate"]
        assert challenge.startswith('Bearer error="invalid_token", error_description="')
        assert "expired" in error_of(answer)
        answer = client.get("/events?topic=a", headers=[(b"Authorization", b'Bearer \xff"\\~')])
        assert answer.status_code == 401

    @pytest.mark.parametrize("header", ["Bearer", "bearer a b"])
    def test_a_header_without_a_token(self, client: httpx.Client, header: str) -> None:
        answer = client.get("/events?topic=a", headers={"Authorization": header})
        assert answer.status_code == 400
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_request"'

    def test_other_schemes_are_others_business(self, client: httpx.Client) -> None:
        answer = client.get("/events/*/history", headers={"Authorization": "Basic eDp5"})
        assert answer.status_code == 200

    def test_by_a_cookie(self, client: httpx.Client) -> None:
        text = make_token(SECRET, publish=["a"], subscribe=["a"], **NAMES)
        cookie = {"Cookie": f'x=1; token="{text}"; y=2'}
        answer = client.post("/events/a", content="1", headers=cookie)
        assert answer.status_code == 403
        assert "Origin" in error_of(answer)
        origin = {"Origin": "https://friend.example", **cookie}
        assert client.post("/events/a", content="1", headers=origin).status_code == 201
        evil = {"Origin": "https://evil.example", **cookie}
        assert client.post("/events/a", content="1", headers=evil).status_code == 403
        page = client.get("/events/a/history", headers=cookie).json()
        assert len(page["events"]) == 1

    def test_by_a_ticket_that_is_good_for_once(self, client: httpx.Client, url: ServedUrl) -> None:
        answer = client.post("/ticket", headers=bearer(subject="ada", publish=["a"]))
        assert answer.status_code == 201
        assert answer.json()["expires_in"] == 30
        path = f"/events/a?ticket={answer.json()['ticket']}"
        assert client.post(path, content="1").status_code == 201
        again = client.post(path, content="1")
        assert again.status_code == 401
        assert "has been used" in error_of(again)
        ticket = client.post("/ticket", headers=bearer(subscribe=["a"])).json()["ticket"]
        with connect(f"{url.websocket}/ws?topic=a&ticket={ticket}", open_timeout=PATIENCE) as ws:
            assert "subscribed" in json.loads(ws.recv(PATIENCE))

    def test_a_ticket_is_good_for_no_longer_than_its_token(self, client: httpx.Client) -> None:
        headers = bearer(subscribe=["a"], lifetime=1)
        ticket = client.post("/ticket", headers=headers).json()["ticket"]
        more = client.post(f"/ticket?ticket={ticket}")
        assert more.status_code == 403
        time.sleep(1.1)
        answer = client.get(f"/events/a/history?ticket={ticket}")
        assert answer.status_code == 401
        assert "expired" in error_of(answer)

    def test_who_has_no_name_gets_no_ticket(self, client: httpx.Client) -> None:
        assert client.post("/ticket").status_code == 403

    def test_a_body_that_takes_its_time_does_not_outlast_a_revocation(
        self, url: ServedUrl, hub: Hub
    ) -> None:
        token = bearer(subject="ada", subscribe=["a"])["Authorization"]

        async def revoke() -> None:
            hub.revoke("ada")

        with url.connect() as connection:
            connection.sendall(
                f"QUERY /.well-known/mercure HTTP/1.1\r\nHost: {url.host}\r\n"
                f"Authorization: {token}\r\nContent-Length: 7\r\nExpect: 100-continue\r\n"
                "Content-Type: application/x-www-form-urlencoded\r\n\r\n".encode()
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            url.run(revoke())
            connection.sendall(b"match=a")
            assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")

    def test_a_ticket_that_is_too_old(
        self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = "codomyrmex.events.streaming.hub.authorize"
        monkeypatch.setattr(f"{module}.TICKET_SECONDS", -1.0)
        for _ in range(3):
            ticket = client.post("/ticket", headers=bearer()).json()["ticket"]
            assert client.get(f"/events?topic=a&ticket={ticket}").status_code == 401
        monkeypatch.setattr(f"{module}.TICKET_SECONDS", 30.0)
        monkeypatch.setattr(f"{module}._MOST_TICKETS", 3)
        answers = [client.post("/ticket", headers=bearer()) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [201, 201, 201, 503]

    def test_a_connection_ends_with_its_token(self, client: httpx.Client, url: ServedUrl) -> None:
        headers = bearer(subscribe=["a"], lifetime=1)
        with (
            client.stream("GET", "/events?topic=a", headers=headers) as answer,
            connect(
                f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE, additional_headers=headers
            ) as ended,
            connect(
                f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE, additional_headers=headers
            ) as renewed,
        ):
            for websocket in (ended, renewed):
                websocket.recv(PATIENCE)
            token = make_token(SECRET, subscribe=["a"], **NAMES)
            renewed.send(json.dumps({"token": token, "ref": 1}))
            told = json.loads(renewed.recv(PATIENCE))
            assert told["renewed"] - time.time() > 3000
            frames = Decoder().feed(answer.read())
            assert frames[-1].event == "stream.disconnect"
            assert "the token has expired" in frames[-1].data
            assert json.loads(ended.recv(PATIENCE)) == {"bye": "the token has expired"}
            with pytest.raises(ConnectionClosed) as closed:
                ended.recv(PATIENCE)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            renewed.send('{"ping": 1}')
            assert json.loads(renewed.recv(PATIENCE)) == {"pong": 1}

    @pytest.mark.parametrize(
        ("token", "status", "reason"),
        [
            (1, 400, "a string"),
            ("x", 401, "no JSON Web Token"),
            (make_token(SECRET, subject="eve", **NAMES), 403, "another subject's"),
        ],
    )
    def test_what_does_not_renew(
        self, url: ServedUrl, token: Any, status: int, reason: str
    ) -> None:
        headers = bearer(subject="ada")
        with connect(
            f"{url.websocket}/ws", open_timeout=PATIENCE, additional_headers=headers
        ) as websocket:
            websocket.send(json.dumps({"token": token}))
            told = json.loads(websocket.recv(PATIENCE))
            assert told["status"] == status
            assert reason in told["error"]

    def test_a_token_that_allows_less_ends_what_it_does_not(self, url: ServedUrl) -> None:
        headers = bearer(subject="ada", subscribe=["a", "b"])
        with connect(
            f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE, additional_headers=headers
        ) as websocket:
            websocket.recv(PATIENCE)
            less = make_token(SECRET, subject="ada", subscribe=["b"], **NAMES)
            websocket.send(json.dumps({"token": less}))
            told = [json.loads(websocket.recv(PATIENCE)) for _ in range(2)]
            assert {"error", "status"} in [set(each) for each in told]

    def test_tokens_made_before_a_subject_was_revoked_are_refused(
        self, client: httpx.Client, url: ServedUrl, hub: Hub
    ) -> None:
        before = bearer(subject="ada", subscribe=["a"])
        other = bearer(subject="bob", subscribe=["a"])
        ticket = client.post("/ticket", headers=before).json()["ticket"]

        async def revoke() -> None:
            hub.revoke("ada")

        url.run(revoke())
        for path, headers in (
            (f"/events?topic=a&ticket={ticket}", {}),
            ("/events?topic=a", before),
        ):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert "revoked" in error_of(answer)
        assert client.get("/events/a/history", headers=other).status_code == 200
        hub._gate._revoked["ada"] -= 2  # as if two seconds had gone by
        later = bearer(subject="ada", subscribe=["a"])
        assert client.get("/events/a/history", headers=later).status_code == 200


class TestWithAFunction:
    def test_both_have_to_allow_it(
        self, client: httpx.Client, url: ServedUrl, current: CurrentHub
    ) -> None:
        def can(subject: str | None, action: str, topic: str) -> bool:
            return subject == "ada"

        hub = current.hub = Hub(tokens=Tokens(SECRET, **NAMES), authorize=can)
        for subject, publish, status in (
            ("ada", ["a"], 201),
            ("ada", ["b"], 403),
            ("bob", ["a"], 403),
        ):
            headers = bearer(subject=subject, publish=publish)
            assert client.post("/events/a", content="1", headers=headers).status_code == status
        assert client.post("/events/a", content="1").status_code == 401
        url.run(hub.aclose())

    def test_a_hub_without_tokens_looks_at_none(
        self, client: httpx.Client, url: ServedUrl, current: CurrentHub
    ) -> None:
        current.hub = open_hub()
        answer = client.get("/events/a/history", headers={"Authorization": "Bearer x"})
        assert answer.status_code == 200
        with connect(f"{url.websocket}/ws", open_timeout=PATIENCE) as websocket:
            websocket.send('{"token": "x"}')
            assert json.loads(websocket.recv(PATIENCE))["status"] == 400
