"""Tokens and the issuer's keys: tokens.py.

Kept here: with tokens only the cart's owner, or carts:all, gets in. The issuer's keys rotate without a restart. Known
keys go on while the issuer is away or answers nonsense, and no valid token waits for a fetch.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flask.testing import FlaskClient
from jwt.algorithms import ECAlgorithm, HMACAlgorithm
from werkzeug.test import TestResponse

import tokens
from settings import SETTINGS
from tests.helpers import (
    ADA,
    LINE,
    SECRET,
    Clock,
    Issuer,
    Site,
    assert_problem,
    eventually,
    gunicorn,
    key_set,
    private_key,
    public_key,
    signed,
    stored,
    token_for,
)

FOREVER = 4_000_000_000  # in the year 2096
NOT_KNOWN_YET = "The token's key is not known yet. Try again."

# Whose cart a token opens

CLAIMS = [
    pytest.param(200, {"sub": "ada", "exp": FOREVER, "aud": "carts"}, id="for the user"),
    pytest.param(200, {"sub": "shop", "exp": FOREVER, "aud": "carts", "scope": "x carts:all"}, id="for all carts"),
    pytest.param(200, {"exp": FOREVER, "aud": "carts", "scope": "carts:all"}, id="for all carts, without sub"),
    pytest.param(200, {"sub": "ada", "exp": FOREVER, "aud": ["x", "carts"]}, id="for two services"),
    pytest.param(401, {"sub": "ada", "aud": "carts"}, id="without exp"),
    pytest.param(401, {"sub": "ada", "exp": FOREVER, "aud": "else"}, id="for another service"),
    pytest.param(401, {"sub": "ada", "exp": FOREVER}, id="for no service"),
    pytest.param(403, {"sub": "Ada", "exp": FOREVER, "aud": "carts"}, id="for a user in capitals"),
    pytest.param(403, {"exp": FOREVER, "aud": "carts"}, id="without sub"),
    pytest.param(
        403, {"sub": "b", "exp": FOREVER, "aud": "carts", "scope": "xcarts:all"}, id="a scope that ends alike"
    ),
    pytest.param(403, {"sub": "b", "exp": FOREVER, "aud": "carts", "scope": ["carts:all"]}, id="a list as scope"),
]
TIMES = [  # seconds from now
    pytest.param(200, "nbf", 29, id="not yet valid on a clock that is ahead"),
    pytest.param(200, "iat", 29, id="issued on a clock that is ahead"),
    pytest.param(401, "nbf", 40, id="not yet valid"),
    pytest.param(401, "exp", -1, id="expired"),
]
NO_TOKENS = ["", "Basic eA==", "Basic \xff", "Bearer", "Bearer \xff.\xff.\xff", f"Bearer {'W1tb' * 999}.e30.x"]


@pytest.mark.parametrize(("status", "claims"), CLAIMS)
def test_a_cart_opens_with_a_token_for_it(guarded: FlaskClient, status: int, claims: dict[str, Any]) -> None:
    response = guarded.post(ADA, json=LINE, headers=signed(claims))

    assert response.status_code == status
    assert stored() == ([("ada", "p", 1)] if status == 200 else [])


@pytest.mark.parametrize(("status", "claim", "seconds"), TIMES)
def test_a_token_opens_in_its_time(guarded: FlaskClient, status: int, claim: str, seconds: int) -> None:
    claims = {"sub": "ada", "exp": FOREVER, "aud": "carts", claim: time.time() + seconds}

    assert guarded.post(ADA, json=LINE, headers=signed(claims)).status_code == status


@pytest.mark.parametrize("sent", NO_TOKENS)
def test_no_cart_opens_without_a_token(guarded: FlaskClient, sent: str) -> None:
    response = guarded.delete(ADA, headers={"Authorization": sent})

    assert_problem(response, 401)
    assert response.headers["WWW-Authenticate"].split()[0] == "Bearer"


def test_the_scheme_is_read_in_any_letters_and_blanks(guarded: FlaskClient) -> None:
    token = token_for("ada", aud="carts")["Authorization"].removeprefix("Bearer ")

    assert guarded.get(ADA, headers={"Authorization": f" bearer  {token} "}).status_code == 404


def test_a_public_key_verifies(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ALGORITHM", "RS256")
    monkeypatch.setattr(tokens, "KEY", private_key("a").public_key())

    assert client.post(ADA, json=LINE, headers=signed_by("a")).status_code == 200
    assert_problem(client.post(ADA, json=LINE, headers=token_for("ada")), 401)


# The issuer's keys


def signed_by(key_id: str, algorithm: str = "RS256", **claims: object) -> dict[str, str]:
    """Return the header with a token for ada that the issuer signed with one of its keys."""
    return signed({"sub": "ada", "exp": FOREVER, **claims}, private_key(key_id), algorithm, key_id)


class Reader:
    """A client that reads ada's cart, which is empty: 404 if a token lets it in."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client

    def read(self, token: dict[str, str]) -> TestResponse:
        """Read with a token."""
        return self.client.get(ADA, headers=token)

    def status(self, key_id: str) -> int:
        """Read with a token that is signed with a key; return the status."""
        return self.read(signed_by(key_id)).status_code


@pytest.fixture
def reader(client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A client of the service in the process, which asks for tokens of the issuer."""
    monkeypatch.setattr(tokens, "ISSUER", tokens.IssuerKeys(issuer.url))
    monkeypatch.setattr(tokens, "ALGORITHM", "RS256, ES256")
    return Reader(client)


def test_a_token_must_name_the_issuer(reader: Reader, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETTINGS, "jwt_issuer", "x")
    issuer.publish("a", use="sig", alg="RS256")

    assert_problem(reader.read(signed_by("a", iss="x")), 404)
    assert_problem(reader.read(signed_by("a", iss="x", sub="bob")), 403)
    assert_problem(reader.read(signed_by("a", iss="y")), 401)
    assert_problem(reader.read(signed_by("a")), 401)


def test_a_new_key_of_the_issuer_is_fetched_ten_seconds_after_the_last_fetch(
    reader: Reader, issuer: Issuer, clock: Clock
) -> None:
    issuer.publish("a")
    assert reader.status("a") == 404

    issuer.publish("a", "b")
    clock.advance(5)
    assert reader.status("b") == 401

    clock.advance(6)
    assert reader.status("b") == 404


def test_many_tokens_with_unknown_keys_ask_the_issuer_once_in_ten_seconds(
    reader: Reader, issuer: Issuer, clock: Clock
) -> None:
    issuer.publish("a")
    reader.status("a")

    clock.advance(11)
    assert {reader.status("b") for _ in range(20)} == {401}

    assert issuer.asked == 2


NONSENSE = [
    pytest.param(503, "", id="down"),
    pytest.param(200, "<html>", id="a page"),
    pytest.param(200, "[]", id="a list"),
    pytest.param(200, key_set(), id="no key"),
    pytest.param(200, key_set(public_key("a", kid="e", use="enc")), id="a key for encryption"),
    pytest.param(200, key_set(public_key("a")), id="a key without an id"),
]


@pytest.mark.parametrize(("status", "text"), NONSENSE)
def test_without_a_known_key_an_issuer_that_is_away_or_odd_is_a_503(
    reader: Reader, issuer: Issuer, status: int, text: str
) -> None:
    issuer.answer(text, status)
    assert_problem(reader.read(signed_by("a")), 503, "unchanged", NOT_KNOWN_YET)

    issuer.publish("a")  # which the next request notices
    assert reader.status("a") == 404


@pytest.mark.parametrize(("status", "text"), NONSENSE)
def test_known_keys_go_on_past_their_hour_while_the_issuer_is_away_or_odd(
    reader: Reader, issuer: Issuer, clock: Clock, status: int, text: str
) -> None:
    issuer.publish("a", "b")
    assert reader.status("a") == 404

    issuer.answer(text, status)
    for seconds in (11, 3600, 86400):
        clock.advance(seconds)
        assert [reader.status("a"), reader.status("b"), reader.status("c")] == [404, 404, 503]


def test_a_revoked_key_ends_after_an_hour(reader: Reader, issuer: Issuer, clock: Clock) -> None:
    issuer.publish("a", "b")
    assert reader.status("a") == 404

    issuer.publish("b")
    clock.advance(3500)
    assert [reader.status("a"), reader.status("b"), issuer.asked] == [404, 404, 1]

    clock.advance(200)
    assert [reader.status("a"), reader.status("b"), issuer.asked] == [401, 404, 2]


def test_no_valid_token_waits_for_an_issuer_that_hangs(
    reader: Reader, issuer: Issuer, clock: Clock, background: ThreadPoolExecutor
) -> None:
    issuer.publish("a")
    assert reader.status("a") == 404

    issuer.hang()
    clock.advance(11)
    unknown = background.submit(reader.status, "b")
    eventually(tokens.ISSUER.lock.locked)  # type: ignore[union-attr]

    assert reader.status("a") == 404
    assert not unknown.done()
    issuer.recover()
    assert unknown.result() == 503


def test_requests_that_wait_for_a_fetch_that_fails_do_not_fetch_again(
    reader: Reader, issuer: Issuer, background: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.hang()
    first = background.submit(reader.status, "a")
    eventually(tokens.ISSUER.lock.locked)  # type: ignore[union-attr]

    others = [background.submit(reader.status, "b") for _ in range(3)]
    assert [one.result() for one in (first, *others)] == [503] * 4
    issuer.recover()

    assert len([message for message in caplog.messages if message.startswith("the issuer's keys")]) == 1


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
def test_a_key_without_alg_works_with_the_algorithm_of_the_setting(
    reader: Reader, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    monkeypatch.setattr(tokens, "ALGORITHM", algorithm)
    issuer.publish("a")

    assert_problem(reader.read(signed_by("a", algorithm)), 404)
    assert_problem(reader.read(signed_by("a", "RS384")), 401)


EC_KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def mixed(reader: Reader, issuer: Issuer) -> Reader:
    """A client of the service, whose issuer publishes a secret and keys of two kinds, beside one that nobody knows."""
    secret = HMACAlgorithm.to_jwk(SECRET, as_dict=True)
    elliptic = ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True)
    unknown = {"kty": "X", "kid": "x"}
    issuer.answer(key_set({**secret, "kid": "o"}, {**elliptic, "kid": "e"}, unknown, public_key("a", kid="a")))
    return reader


def test_of_a_mixed_set_each_key_works_with_its_own_algorithm(mixed: Reader) -> None:
    claims = {"sub": "ada", "exp": FOREVER}

    assert_problem(mixed.read(signed(claims, private_key("a"), "RS256", "a")), 404)
    assert_problem(mixed.read(signed(claims, EC_KEY, "ES256", "e")), 404)


MISUSES = [
    pytest.param(SECRET, "HS256", "o", id="the published secret"),
    pytest.param(None, "none", "a", id="no signature"),
    pytest.param(private_key("a"), "PS256", "a", id="an algorithm that is not in the setting"),
    pytest.param(private_key("a"), "RS256", "e", id="by the id of a key of another kind"),
    pytest.param(private_key("a"), "RS256", "o", id="by the id of the secret"),
    pytest.param(EC_KEY, "ES256", "a", id="elliptic, by the id of an RSA key"),
    pytest.param(private_key("b"), "RS256", "a", id="a stranger's key"),
    pytest.param(private_key("a"), "RS256", None, id="without an id"),
    pytest.param(private_key("a"), "RS256", "\ud800", id="an id that is not UTF-8"),
]


@pytest.mark.parametrize(("key", "algorithm", "key_id"), MISUSES)
def test_a_mixed_set_lets_nothing_through_that_the_setting_does_not_name(
    mixed: Reader, key: Any, algorithm: str, key_id: str | None
) -> None:
    assert_problem(mixed.read(signed({"sub": "ada", "exp": FOREVER}, key, algorithm, key_id)), 401)


# In a worker, where a fetch is given up by gevent's clock

HURRIED = "import tokens\ntokens.LIFESPAN = tokens.COOLDOWN = 0.5  # seconds\nfrom cart import app\n"


@pytest.fixture
def hurried(issuer: Issuer, tmp_path: Path) -> Any:
    """The service as it is deployed, with an issuer, for which an hour lasts half a second."""
    (tmp_path / "hurried.py").write_text(HURRIED)
    options = ["--pythonpath", str(tmp_path)]
    with gunicorn(tmp_path / "log", *options, app="hurried:app", JWT_JWKS_URL=issuer.url) as service:
        yield service


def test_a_silent_issuer_holds_up_no_known_key_for_more_than_half_a_second(hurried: Site, issuer: Issuer) -> None:
    issuer.publish("a")
    assert hurried.request("GET", ADA, headers=signed_by("a")).status_code == 404

    issuer.hang()
    for _ in range(3):
        time.sleep(0.5)  # past its hour
        assert hurried.request("GET", ADA, headers=signed_by("a"), timeout=1).status_code == 404


def test_an_issuer_that_drips_is_given_up(hurried: Site, issuer: Issuer) -> None:
    issuer.drip()

    assert_problem(hurried.request("GET", ADA, headers=signed_by("a")), 503, "unchanged", NOT_KNOWN_YET)
