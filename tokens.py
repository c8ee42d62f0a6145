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
FETCH_TIMEOUT = 5  # seconds for the issuer to send anything
WAIT_TIMEOUT = 0.9  # seconds that a request waits for a fetch of the issuer's keys
COOLDOWN = 10  # seconds from one fetch to the next, if a key is not known
REFRESH = 300  # seconds from one fetch to the next, if all keys are known
KEEP = 3600  # seconds that the keys count if no fetch succeeds
MAX_KEYS = 1024 * 1024  # bytes of the list of keys
REASONS: dict[type, str] = {jwt.ExpiredSignatureError: "expired", jwt.ImmatureSignatureError: "not valid yet"}


class InvalidToken(Exception):
    """The token is refused; the text says why."""


class KeysUnavailable(Exception):
    """The issuer does not tell whether it has the token's key."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Fails if the issuer's address redirects: only that address is trusted."""

    def redirect_request(self, *_: object) -> None:
        return None


class IssuerKeys:
    """The keys that an issuer publishes (RFC 7517), fetched beside the requests: no token with a known key waits."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: dict[str | None, jwt.PyJWK] = {}
        self.keys_time = -math.inf  # when the fetch that brought them began
        self.fetch_time = -math.inf  # when the last fetch began
        self.fetch_thread: threading.Thread | None = None

    def find(self, key_id: str | None) -> jwt.PyJWK:
        """Return the key with an id.

        :raise InvalidToken: the issuer has no such key
        :raise KeysUnavailable: the issuer does not tell its keys in time
        """
        now = time.monotonic()
        is_known = key_id in self.keys and now - self.keys_time < KEEP
        if now - self.fetch_time > (REFRESH if is_known else COOLDOWN):
            self.fetch_time = now
            self.fetch_thread = threading.Thread(target=self.fetch, args=(now,), daemon=True)
            self.fetch_thread.start()
        if not is_known:
            if self.fetch_thread:
                self.fetch_thread.join(WAIT_TIMEOUT)
            if self.keys_time < self.fetch_time:  # the last fetch failed, or goes on
                raise KeysUnavailable
            if key_id not in self.keys:
                raise InvalidToken("The token is signed with a key that its issuer does not publish.")
        return self.keys[key_id]

    def fetch(self, now: float) -> None:
        """Fetch the keys. If that fails, those that are known stay."""
        try:
            with urllib.request.build_opener(NoRedirect).open(self.url, timeout=FETCH_TIMEOUT) as answer:
                published = jwt.PyJWKSet.from_json(answer.read(MAX_KEYS).decode()).keys
            if now > self.keys_time:  # or a later fetch was faster
                self.keys = {key.key_id: key for key in published if key.public_key_use in (None, "sig")}
                self.keys_time = now
        except Exception as error:  # the network, the server and its answer have their own ways to fail
            logging.getLogger(__name__).warning("the issuer's keys: %r", error)


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
    checks: dict[str, Any] = {"audience": settings.JWT_AUDIENCE, "issuer": settings.JWT_ISSUER, "leeway": LEEWAY}
    claims: dict[str, Any] = jwt.decode(token, key, settings.JWT_ALGORITHMS, options={"require": ["exp"]}, **checks)
    return claims
