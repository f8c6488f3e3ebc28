"""Access tokens: JSON Web Tokens as RFC 9068 and the Mercure draft have them.

What a token lets its bearer do is in its claim ``authorization_details`` (RFC 9396): details of the
type below, each with actions and topics.

    "authorization_details": [{
        "type": "https://mercure.rocks/authorization-detail",
        "actions": ["subscribe"],
        "topics": [{"match": "orders.*", "match_type": "pattern"}]
    }]

``match_type`` is ``exact`` (the default), ``urlpattern``, or this library's own ``pattern``.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..errors import MissingExtra, TopicError
from .authorize import InvalidToken
from .matchers import Matcher, matcher

try:
    import jwt

    from .keys import Key, Keys, keys_of
except ModuleNotFoundError as error:  # pragma: no cover - in an environment without the extra
    if (error.name or "").startswith("codomyrmex"):
        raise
    raise MissingExtra("access tokens", "tokens") from error

__all__ = ["DETAIL", "Grant", "InvalidToken", "Token", "Tokens", "make_token"]

DETAIL: Final = "https://mercure.rocks/authorization-detail"
COOKIE: Final = "__Secure-mercure_access_token"

_ALGORITHMS: Final = frozenset(("HS256", "RS256", "ES256", "EdDSA"))
_TYPES: Final = frozenset(("at+jwt", "application/at+jwt"))
_ACTIONS: Final = frozenset(("subscribe", "publish"))
_MOST: Final = 100
_LONGEST: Final = 64 * 1024


class Grant(NamedTuple):
    """What one detail of a token allows.

    Attributes:
        actions: ``subscribe``, ``publish``, or both.
        matchers: say which topics; by what they were written as.
        payload: what others may be told of who subscribes by it.
    """

    actions: frozenset[str]
    matchers: Mapping[tuple[str, str], Matcher]
    payload: Any = None


class Token(NamedTuple):
    """A token that was accepted.

    Attributes:
        subject: its ``sub``.
        expires: when it ends, in seconds since 1970.
        issued: when it was made; None: it does not say.
        grants: what it allows.
    """

    subject: str | None
    expires: float
    issued: float | None
    grants: Sequence[Grant]

    def allows(self, action: str, topic: str) -> bool:
        """Whether it allows to do something with a topic."""
        return any(
            action in grant.actions and any(matches(topic) for matches in grant.matchers.values())
            for grant in self.grants
        )


class Tokens:
    """The access tokens that a hub accepts.

    A key is used with the one algorithm that it is for: HS256, RS256, ES256 or EdDSA.

    Args:
        keys: the keys, or where they are: a secret of at least 32 bytes, PEM, JSON Web Keys,
            ``env:NAME``, ``file:PATH``, or the URL of a JSON Web Key Set; or several of them.
        issuer: who has to have made a token (``iss``).
        audience: for whom a token has to be (``aud``): as a rule, the hub's URL as clients know it.
        url: against which relative URL patterns are resolved; by default the audience.
        cookie: name of the cookie that a token may come in.
        leeway: seconds by which clocks may differ.

    Raises:
        ValueError: there is no key that can be used; says where.
        MissingExtra: the package PyJWT is missing.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        *,
        issuer: str,
        audience: str,
        url: str | None = None,
        cookie: str = COOKIE,
        leeway: float = 0.0,
    ) -> None:
        self._keys = [Keys(source) for source in ([keys] if isinstance(keys, str) else keys)]
        self.issuer = issuer
        self.audience = audience
        self.cookie = cookie
        self._url = audience if url is None else url
        self._leeway = leeway

    def reload(self) -> None:
        """Read all keys again.

        Raises:
            ValueError: there are none that can be used somewhere; those that were there stay.
        """
        for keys in self._keys:
            keys.reload()

    async def check(self, text: str) -> Token:
        """The token, if it is accepted (RFC 9068, section 4).

        Raises:
            InvalidToken: it is not.
        """
        if len(text) > _LONGEST:
            raise InvalidToken("the token is too long")
        try:
            header = jwt.get_unverified_header(text)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("it is no JSON Web Token") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            raise InvalidToken(f"the algorithm {algorithm!r:.30} is not accepted")
        if str(header.get("typ", "")).lower() not in _TYPES:
            raise InvalidToken("its typ is not at+jwt")
        if not isinstance(kid, str | None):
            raise InvalidToken("its kid is no string")
        return self._token_of(await self._claims(text, algorithm, kid))

    async def _claims(self, text: str, algorithm: str, kid: str | None) -> dict[str, Any]:
        for keys in self._keys:
            for key in await keys.find(kid, algorithm):
                try:
                    return self._decoded(text, key)
                except jwt.InvalidSignatureError:
                    continue
                except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
                    raise InvalidToken(str(error) or type(error).__name__) from None
        raise InvalidToken("no key that is known has signed it")

    def _decoded(self, text: str, key: Key) -> dict[str, Any]:
        return jwt.decode(
            text,
            key.value,
            algorithms=[key.algorithm],
            audience=self.audience,
            issuer=self.issuer,
            leeway=self._leeway,
            options={"require": ["exp", "iss", "aud"], "verify_sub": False, "verify_jti": False},
        )

    def _token_of(self, claims: dict[str, Any]) -> Token:
        subject, issued = claims.get("sub"), claims.get("iat")
        if not isinstance(subject, str | None):
            raise InvalidToken("its sub is no string")
        if not isinstance(issued, int | float | None):
            raise InvalidToken("its iat is no number")
        details = claims.get("authorization_details", [])
        grants = self._grants_of(details)
        return Token(subject, float(claims["exp"]), issued, grants)

    def _grants_of(self, details: Any) -> list[Grant]:
        """What details allow.

        Raises:
            InvalidToken: one of them is not as it has to be, which makes the whole token invalid.
        """
        if not isinstance(details, list) or len(details) > _MOST:
            raise InvalidToken(f"authorization_details is an array of up to {_MOST}")
        grants: list[Grant] = []
        for detail in details:
            if not isinstance(detail, dict) or not isinstance(detail.get("type"), str):
                raise InvalidToken("a detail is an object with a type")
            if detail["type"] == DETAIL:
                grants.append(self._grant_of(detail))
        if sum(len(grant.matchers) for grant in grants) > _MOST:
            raise InvalidToken(f"a token has up to {_MOST} topics")
        return grants

    def _grant_of(self, detail: dict[str, Any]) -> Grant:
        actions, topics, payload = (detail.get(name) for name in ("actions", "topics", "payload"))
        if not isinstance(actions, list) or not all(isinstance(each, str) for each in actions):
            raise InvalidToken("a detail's actions are an array of strings")
        if not isinstance(topics, list):
            raise InvalidToken("a detail's topics are an array")
        if payload is not None and not isinstance(payload, dict):
            raise InvalidToken("a detail's payload is an object")
        matchers: dict[tuple[str, str], Matcher] = {}
        for topic in topics[: _MOST + 1]:
            kind = topic.get("match_type", "exact") if isinstance(topic, dict) else None
            match = topic.get("match") if isinstance(topic, dict) else None
            if not isinstance(match, str) or not isinstance(kind, str):
                raise InvalidToken('a topic is an object: {"match": …}')
            try:
                matchers[kind, match] = matcher(kind, match, self._url)
            except (ValueError, TopicError) as error:
                raise InvalidToken(str(error)) from None
        return Grant(_ACTIONS.intersection(actions), matchers, payload)


def make_token(
    key: str,
    *,
    issuer: str,
    audience: str,
    subject: str | None = None,
    subscribe: Iterable[str] = (),
    publish: Iterable[str] = (),
    lifetime: float = 3600.0,
    kid: str | None = None,
    **claims: Any,
) -> str:
    """A token that a hub accepts which has the same key, issuer and audience.

    Args:
        key: a secret of at least 32 bytes, or a private key in PEM.
        issuer, audience: as of `Tokens`.
        subject: who bears it.
        subscribe, publish: topics and patterns such as ``orders.*``.
        lifetime: seconds until it expires.
        kid: the key's id.
        claims: what else it says.

    Raises:
        ValueError: the key cannot be used.
    """
    [known] = keys_of(key)
    details = [
        {
            "type": DETAIL,
            "actions": [action],
            "topics": [{"match": each, "match_type": "pattern"} for each in topics],
        }
        for action, topics in (("subscribe", list(subscribe)), ("publish", list(publish)))
        if topics
    ]
    now = int(time.time())
    said = {
        "iss": issuer,
        "aud": audience,
        "iat": now,
        "exp": now + lifetime,
        "authorization_details": details,
        **({} if subject is None else {"sub": subject}),
        **claims,
    }
    headers = {"typ": "at+jwt", **({} if kid is None else {"kid": kid})}
    signing = known.value if known.algorithm == "HS256" else key
    return jwt.encode(said, signing, algorithm=known.algorithm, headers=headers)
