"""Whose cart a bearer token opens. It knows no Flask."""

import logging
import re
import sys
import time
from typing import Any

import gevent
import jwt
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, Unauthorized

from settings import SETTINGS

LEEWAY = 30  # seconds by which an issuer's clock may be ahead


class IssuerKeys(jwt.PyJWKClient):
    """The keys that an issuer publishes (RFC 7517). Known ones count for a day, also while the issuer is away."""

    def get_signing_keys(self, refresh: bool = False) -> list[jwt.PyJWK]:
        try:
            with gevent.Timeout(3, TimeoutError()):  # PyJWT's timeout is for each part of the answer
                return super().get_signing_keys(refresh)
        except Exception as error:  # of the network, of the server, or its answer is no list of keys
            logging.getLogger(__name__).warning("the issuer's keys: %r", error)
            raise ServiceUnavailable("The token's key is not known yet. Try again.", retry_after=1) from error

    def find(self, key_id: str) -> jwt.PyJWK:
        """Return the key with an id. One that is in the list is found without waiting for a fetch."""
        return self.match_kid(self.get_signing_keys(), key_id) or self.get_signing_key(key_id)


URL = SETTINGS.jwt_jwks_url
ISSUER = IssuerKeys(URL, lifespan=86400, timeout=2, cooldown_duration=10) if URL else None
ALGORITHM = SETTINGS.jwt_algorithm or ("RS256" if ISSUER else "HS256")
KEY: Any = None
if SETTINGS.jwt_key:
    try:
        algorithm = jwt.get_algorithm_by_name(ALGORITHM)
        KEY = algorithm.prepare_key(SETTINGS.jwt_key)
        fault = "It is a private key." if hasattr(KEY, "public_key") else algorithm.check_key_length(KEY)
    except Exception:  # each algorithm has its own ways to fail
        fault = "It is neither, or these are several algorithms."
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
    except jwt.PyJWTError as error:
        logging.getLogger(__name__).info("a token was refused: %s", type(error).__name__)
        reason = str(error).encode(errors="replace").decode()  # it may repeat a part of the token
        challenge = WWWAuthenticate("bearer", {"error": "invalid_token"})
        raise Unauthorized(f"The token is not valid: {reason}", www_authenticate=challenge) from error
    scope = claims.get("scope")
    if claims.get("sub") != user_id and not (isinstance(scope, str) and "carts:all" in scope.split(" ")):
        raise Forbidden("The token is for another user, and without the scope carts:all.")
