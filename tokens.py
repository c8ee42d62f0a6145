"""Whose cart a bearer token opens. It does not use Flask."""

import logging
import re
import sys
import threading
import time
from typing import Any

import gevent
import jwt
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, Unauthorized

from settings import SETTINGS

LEEWAY = 30  # seconds by which an issuer's clock may be ahead
LIFESPAN = 3600  # seconds after which the issuer is asked again for the keys that are known
COOLDOWN = 10  # seconds after an answer in which it is not asked again for a key that is not


class IssuerKeys:
    """The keys that an issuer publishes (RFC 7517). They stay valid while it is away, or its answer has none."""

    def __init__(self, url: str) -> None:
        self.client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=2)
        self.keys: dict[str | None, Any] = {}
        self.fetched_at = self.failed_at = float("-inf")
        self.lock = threading.Lock()  # held while the issuer is asked

    def find(self, key_id: str) -> Any:
        """Return the key with an id. A known one is returned within half a second, even if the issuer is silent.

        :raise PyJWTError: the issuer has no such key
        :raise ServiceUnavailable: the issuer does not tell its keys
        """
        if key_id not in self.keys:
            self.fetch(COOLDOWN)
        elif time.monotonic() - self.fetched_at > LIFESPAN and not self.lock.locked():
            gevent.spawn(self.fetch, LIFESPAN).join(timeout=0.5)  # if the issuer is quick, a revoked key ends here
        if key_id in self.keys:
            return self.keys[key_id]
        if self.failed_at > self.fetched_at:
            raise ServiceUnavailable("The token's key is not known yet. Try again.", retry_after=1)
        raise jwt.PyJWKClientError("The issuer has no key with its id")

    def fetch(self, max_age: float) -> None:
        """Ask the issuer for its keys, unless it told them within `max_age` seconds."""
        called_at = time.monotonic()
        with self.lock:
            if time.monotonic() - self.fetched_at <= max_age or self.failed_at >= called_at:
                return  # another request has asked while this one waited
            try:
                with gevent.Timeout(3, TimeoutError()):  # PyJWT's timeout is for each part of the answer
                    self.keys = {key.key_id: key.key for key in self.client.get_signing_keys()}
                self.fetched_at = time.monotonic()
            except Exception as error:  # of the network, of the server, or its answer has no keys
                logging.getLogger(__name__).warning("the issuer's keys: %r", error)
                self.failed_at = time.monotonic()


ISSUER = IssuerKeys(SETTINGS.jwt_jwks_url) if SETTINGS.jwt_jwks_url else None
ALGORITHM = SETTINGS.jwt_algorithm or ("RS256" if ISSUER else "HS256")
KEY: Any = None
if SETTINGS.jwt_key:
    try:
        algorithm = jwt.get_algorithm_by_name(ALGORITHM)
        KEY = algorithm.prepare_key(SETTINGS.jwt_key)
        fault = "It is a private key." if hasattr(KEY, "public_key") else algorithm.check_key_length(KEY)
    except Exception:  # each algorithm has its own ways to fail
        fault = "It is neither, or there are several algorithms."
    if fault:
        sys.exit(f"cart: JWT_KEY must be a secret or a PEM public key for JWT_ALGORITHM {ALGORITHM}. {fault}")


def check(authorization: str, user_id: str) -> None:
    """Refuse a caller unless a JSON Web Token (RFC 7519) opens the user's cart, by `sub`, or carts:all in `scope`.

    :raise Unauthorized: it is missing, malformed, expired, not valid yet, wrongly signed or for another service
    :raise Forbidden: it is for another user
    :raise ServiceUnavailable: the issuer does not tell its keys
    """
    scheme, _, token = " ".join(authorization.split()).partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("Authorization must be a bearer token.", www_authenticate=WWWAuthenticate("bearer"))
    checks: dict[str, Any] = {"audience": SETTINGS.jwt_audience, "issuer": SETTINGS.jwt_issuer, "leeway": LEEWAY}
    try:
        key = ISSUER.find(jwt.get_unverified_header(token).get("kid", "")) if ISSUER else KEY
        claims = jwt.decode(token, key, re.split(", *", ALGORITHM), options={"require": ["exp"]}, **checks)
        if int(claims["exp"]) <= time.time():  # the leeway is for clocks that are ahead, not for old tokens
            raise jwt.ExpiredSignatureError("Signature has expired")
    except (jwt.PyJWTError, TypeError) as error:  # TypeError: the issuer's key is of another kind
        logging.getLogger(__name__).info("a token was refused: %s", type(error).__name__)
        reason = str(error).encode(errors="replace").decode()  # it may have lone surrogates, from the token
        challenge = WWWAuthenticate("bearer", {"error": "invalid_token"})
        raise Unauthorized(f"The token is not valid: {reason}", www_authenticate=challenge) from error
    scope = claims.get("scope")
    if claims.get("sub") != user_id and not (isinstance(scope, str) and "carts:all" in scope.split(" ")):
        raise Forbidden("The token is for another user, and without the scope carts:all.")
