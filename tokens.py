"""Whose cart a bearer token opens. It knows no Flask."""

import logging
import math
import threading
import time
import urllib.request
from typing import Any

import jwt

import settings

LEEWAY = 30  # seconds by which an issuer's clock may be ahead
# Seconds: how long a request waits for the issuer's keys, how old they get before they are fetched again and before
# they count no longer, and how soon after a try the next one may be.
FETCH_TIMEOUT, REFRESH, KEEP, COOLDOWN = 0.9, 300, 3600, 10
MAX_KEYS = 1024 * 1024  # bytes of the list
REASONS: dict[type, str] = {jwt.ExpiredSignatureError: "expired", jwt.ImmatureSignatureError: "not valid yet"}


class InvalidToken(Exception):
    """The token is refused; the text says why."""


class KeysUnavailable(Exception):
    """The issuer does not tell whether it has the token's key."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Fails where the issuer's address sends elsewhere: only that address is trusted."""

    def redirect_request(self, *_: object) -> None:
        return None


class IssuerKeys:
    """The keys that an issuer publishes (RFC 7517), fetched beside the requests: no token with a known key waits."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.known: dict[str | None, jwt.PyJWK] = {}
        self.tried = self.fetched = -math.inf
        self.fetch_ended = threading.Event()

    def find(self, key_id: str | None) -> jwt.PyJWK:
        """Return the key with an id.

        :raise InvalidToken: the issuer has no such key
        :raise KeysUnavailable: the issuer does not answer in time
        """
        now = time.monotonic()
        is_known = key_id in self.known and now - self.fetched < KEEP
        if now - self.tried > (REFRESH if is_known else COOLDOWN):
            self.tried = now
            self.fetch_ended.clear()
            threading.Thread(target=self.fetch, daemon=True).start()
        if not is_known:
            self.fetch_ended.wait(FETCH_TIMEOUT)
            if self.fetched < self.tried:
                raise KeysUnavailable
            if key_id not in self.known:
                raise InvalidToken("The token is signed with a key that its issuer does not publish.")
        return self.known[key_id]

    def fetch(self) -> None:
        """Fetch the keys; leave those that are known where it fails."""
        try:
            with urllib.request.build_opener(NoRedirect).open(self.url, timeout=5) as answer:
                published = jwt.PyJWKSet.from_json(answer.read(MAX_KEYS).decode()).keys
            self.known = {key.key_id: key for key in published if key.public_key_use in (None, "sig")}
            self.fetched = time.monotonic()
        except Exception as error:  # the network, the server and its answer have their own ways to fail
            logging.getLogger(__name__).warning("the issuer's keys: %r", error)
        finally:
            self.fetch_ended.set()


issuer = None if settings.JWT_JWKS_URL is None else IssuerKeys(settings.JWT_JWKS_URL)


def are_required() -> bool:
    """Tell whether the settings ask for tokens."""
    return settings.JWT_KEY is not None or issuer is not None


def opens(token: str, user_id: str) -> bool:
    """Tell whether a JSON Web Token (RFC 7519) opens a user's cart: its `sub`, or carts:all in its `scope`.

    :raise InvalidToken: it is malformed, expired, not valid yet, wrongly signed or for another service
    :raise KeysUnavailable: the issuer's keys cannot be fetched now
    """
    try:
        claims = decode(token)
        if int(claims["exp"]) <= time.time():  # the leeway is for clocks that are ahead, not for old tokens
            raise jwt.ExpiredSignatureError
    except jwt.PyJWTError as error:
        reason = REASONS.get(type(error), "malformed, wrongly signed or not for this service")
        raise InvalidToken(f"The token is {reason}.") from error
    scope = claims.get("scope")
    return claims.get("sub") == user_id or (isinstance(scope, str) and "carts:all" in scope.split(" "))


def decode(token: str) -> dict[str, Any]:
    """Return the claims of a token whose signature, audience, issuer and times are right."""
    key = settings.JWT_KEY
    if issuer is not None:
        key = issuer.find(jwt.get_unverified_header(token).get("kid"))
    claims: dict[str, Any] = jwt.decode(
        token,
        key,
        settings.JWT_ALGORITHMS,
        options={"require": ["exp"]},
        audience=settings.JWT_AUDIENCE,
        issuer=settings.JWT_ISSUER,
        leeway=LEEWAY,
    )
    return claims
