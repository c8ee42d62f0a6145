"""Tokens and the issuer's keys: tokens.py.

Kept here: with tokens only the cart's owner, or carts:all, gets in. The issuer's keys rotate without a restart. Known
keys go on while the issuer is away or answers nonsense, and no valid token waits for a fetch.
"""

import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm, HMACAlgorithm

import tokens
from settings import SETTINGS
from tests.helpers import (
    ADA,
    FOREVER,
    LINE,
    SECRET,
    assert_problem,
    eventually,
    gunicorn,
    key_set,
    private_key,
    public_key,
    signed,
    token_for,
)

CLAIMS = {
    "for the user": (200, {"sub": "ada", "exp": FOREVER, "aud": "carts"}),
    "for all carts": (200, {"sub": "shop", "exp": FOREVER, "aud": "carts", "scope": "x carts:all"}),
    "for all carts, without sub": (200, {"exp": FOREVER, "aud": "carts", "scope": "carts:all"}),
    "without exp": (401, {"sub": "ada", "aud": "carts"}),
    "for another service": (401, {"sub": "ada", "exp": FOREVER, "aud": "else"}),
    "for no service": (401, {"sub": "ada", "exp": FOREVER}),
    "for a user in capitals": (403, {"sub": "Ada", "exp": FOREVER, "aud": "carts"}),
    "without sub": (403, {"exp": FOREVER, "aud": "carts"}),
    "a scope that ends alike": (403, {"sub": "b", "exp": FOREVER, "aud": "carts", "scope": "xcarts:all"}),
    "a list as scope": (403, {"sub": "b", "exp": FOREVER, "aud": "carts", "scope": ["carts:all"]}),
}
TIMES = {  # in seconds from now
    "not yet valid on a clock that is ahead": (200, "nbf", 29),
    "issued on a clock that is ahead": (200, "iat", 29),
    "not yet valid": (401, "nbf", 40),
    "expired": (401, "exp", -1),
}
NO_TOKENS = ["", "Basic eA==", "Basic \xff", "Bearer", "Bearer \xff.\xff.\xff", f"Bearer {'W1tb' * 999}.e30.x"]


@pytest.mark.parametrize(("status", "claims"), CLAIMS.values(), ids=CLAIMS)
def test_a_cart_opens_with_a_token_for_it(guarded, postgres, status, claims):
    assert guarded.post(ADA, json=LINE, headers=signed(claims)).status_code == status

    assert postgres.stored() == ([("ada", "p", 1)] if status == 200 else [])


@pytest.mark.parametrize(("status", "claim", "seconds"), TIMES.values(), ids=TIMES)
def test_a_token_opens_in_its_time(guarded, status, claim, seconds):
    claims = {"sub": "ada", "exp": FOREVER, "aud": "carts", claim: time.time() + seconds}

    assert guarded.post(ADA, json=LINE, headers=signed(claims)).status_code == status


@pytest.mark.parametrize("sent", NO_TOKENS)
def test_no_cart_opens_without_a_token(guarded, sent):
    response = guarded.delete(ADA, headers={"Authorization": sent})

    assert_problem(response, 401)
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_scheme_is_read_in_any_letters_and_blanks(guarded):
    token = token_for("ada", aud="carts")["Authorization"].removeprefix("Bearer ")

    assert guarded.get(ADA, headers={"Authorization": f" bearer  {token} "}).status_code == 404


# The issuer's keys


def signed_by(key_id, algorithm="RS256", **claims):
    """Return the header with a token for ada that the issuer signed with one of its keys."""
    return signed({"sub": "ada", "exp": FOREVER, **claims}, private_key(key_id), algorithm, key_id)


@pytest.fixture
def read(client, issuer, monkeypatch):
    """Read ada's empty cart with a token, and return the status: 404 if the token of the issuer lets it in."""
    monkeypatch.setattr(tokens, "ISSUER", tokens.IssuerKeys(issuer.url))
    monkeypatch.setattr(tokens, "ALGORITHM", "RS256, ES256")
    return lambda token: client.get(ADA, headers=token).status_code


def test_a_token_must_name_the_issuer(read, issuer, monkeypatch):
    monkeypatch.setattr(SETTINGS, "jwt_issuer", "x")
    issuer.publish("a", use="sig", alg="RS256")

    assert read(signed_by("a", iss="x")) == 404
    assert read(signed_by("a", iss="x", sub="bob")) == 403
    assert read(signed_by("a", iss="y")) == 401
    assert read(signed_by("a")) == 401


def test_a_new_key_of_the_issuer_is_fetched_ten_seconds_after_the_last_fetch(read, issuer, clock):
    issuer.publish("a")
    assert read(signed_by("a")) == 404

    issuer.publish("a", "b")
    clock.advance(5)
    assert read(signed_by("b")) == 401
    assert issuer.asked == 1

    clock.advance(6)
    assert read(signed_by("b")) == 404


NONSENSE = {
    "down": (503, ""),
    "a page": (200, "<html>"),
    "a list": (200, "[]"),
    "no key": (200, key_set()),
    "a key for encryption": (200, key_set(public_key("a", kid="e", use="enc"))),
    "a key without an id": (200, key_set(public_key("a"))),
}


@pytest.mark.parametrize(("status", "text"), NONSENSE.values(), ids=NONSENSE)
def test_without_a_known_key_an_issuer_that_is_away_or_odd_is_a_503(read, issuer, status, text):
    issuer.answer(text, status)
    assert read(signed_by("a")) == 503

    issuer.publish("a")  # which the next request notices
    assert read(signed_by("a")) == 404


@pytest.mark.parametrize(("status", "text"), NONSENSE.values(), ids=NONSENSE)
def test_known_keys_go_on_past_their_hour_while_the_issuer_is_away_or_odd(read, issuer, clock, status, text):
    issuer.publish("a", "b")
    assert read(signed_by("a")) == 404

    issuer.answer(text, status)
    for seconds in (11, 3600, 86400):
        clock.advance(seconds)
        assert [read(signed_by("a")), read(signed_by("b")), read(signed_by("c"))] == [404, 404, 503]


def test_a_revoked_key_ends_after_an_hour(read, issuer, clock):
    issuer.publish("a", "b")
    assert read(signed_by("a")) == 404

    issuer.publish("b")
    clock.advance(3500)
    assert [read(signed_by("a")), read(signed_by("b")), issuer.asked] == [404, 404, 1]

    clock.advance(200)
    assert [read(signed_by("a")), read(signed_by("b")), issuer.asked] == [401, 404, 2]


def test_no_valid_token_waits_for_an_issuer_that_hangs(read, issuer, clock, background):
    issuer.publish("a")
    assert read(signed_by("a")) == 404

    issuer.hang()
    clock.advance(11)
    unknown = background.submit(read, signed_by("b"))
    eventually(tokens.ISSUER.lock.locked)

    assert read(signed_by("a")) == 404
    assert not unknown.done()
    issuer.recover()
    assert unknown.result() == 503


def test_requests_that_wait_for_a_fetch_that_fails_do_not_fetch_again(read, issuer, background, caplog):
    issuer.hang()
    first = background.submit(read, signed_by("a"))
    eventually(tokens.ISSUER.lock.locked)

    others = [background.submit(read, signed_by("b")) for _ in range(3)]
    assert [one.result() for one in (first, *others)] == [503] * 4
    issuer.recover()

    assert len([message for message in caplog.messages if message.startswith("the issuer's keys")]) == 1


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
def test_a_key_without_alg_works_with_the_algorithm_of_the_setting(read, issuer, monkeypatch, algorithm):
    monkeypatch.setattr(tokens, "ALGORITHM", algorithm)
    issuer.publish("a")

    assert read(signed_by("a", algorithm)) == 404
    assert read(signed_by("a", "RS384")) == 401


# A set of several kinds of keys

EC_KEY = ec.generate_private_key(ec.SECP256R1())
SETS_KEYS = [
    {**HMACAlgorithm.to_jwk(SECRET, as_dict=True), "kid": "secret"},
    {**ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True), "kid": "elliptic"},
    {"kty": "of no kind that is known", "kid": "unknown"},
    public_key("a", kid="a"),
]
MISUSES = {
    "the published secret": (SECRET, "HS256", "secret"),
    "no signature": (None, "none", "a"),
    "an algorithm that is not in the setting": (private_key("a"), "PS256", "a"),
    "by the id of a key of another kind": (private_key("a"), "RS256", "elliptic"),
    "by the id of the secret": (private_key("a"), "RS256", "secret"),
    "elliptic, by the id of an RSA key": (EC_KEY, "ES256", "a"),
    "a stranger's key": (private_key("b"), "RS256", "a"),
    "without an id": (private_key("a"), "RS256", None),
    "an id that is not UTF-8": (private_key("a"), "RS256", "\ud800"),
}


@pytest.mark.parametrize(
    ("key", "algorithm", "key_id"), [(private_key("a"), "RS256", "a"), (EC_KEY, "ES256", "elliptic")]
)
def test_of_a_mixed_set_each_key_works_with_its_own_algorithm(read, issuer, key, algorithm, key_id):
    issuer.answer(key_set(*SETS_KEYS))

    assert read(signed({"sub": "ada", "exp": FOREVER}, key, algorithm, key_id)) == 404


@pytest.mark.parametrize(("key", "algorithm", "key_id"), MISUSES.values(), ids=MISUSES)
def test_a_mixed_set_lets_nothing_through_that_the_setting_does_not_name(read, issuer, key, algorithm, key_id):
    issuer.answer(key_set(*SETS_KEYS))

    assert read(signed({"sub": "ada", "exp": FOREVER}, key, algorithm, key_id)) == 401


# In a worker, where a fetch is given up by gevent's clock

HURRIED = "import tokens\ntokens.LIFESPAN = tokens.COOLDOWN = 0.5  # seconds\nfrom cart import app\n"


@pytest.fixture
def hurried(issuer, tmp_path):
    """The service as it is deployed, with an issuer, for which an hour lasts half a second."""
    (tmp_path / "hurried.py").write_text(HURRIED)
    options = ["--pythonpath", str(tmp_path)]
    with gunicorn(tmp_path / "log", *options, app="hurried:app", JWT_JWKS_URL=issuer.url) as service:
        yield service


def test_a_silent_issuer_holds_up_no_known_key_for_more_than_half_a_second(hurried, issuer):
    issuer.publish("a")
    assert hurried.request("GET", ADA, headers=signed_by("a")).status_code == 404

    issuer.hang()
    for _ in range(3):
        time.sleep(0.5)  # past its hour
        assert hurried.request("GET", ADA, headers=signed_by("a"), timeout=1).status_code == 404


def test_an_issuer_that_drips_is_given_up(hurried, issuer):
    issuer.drip()

    assert_problem(hurried.request("GET", ADA, headers=signed_by("a")), 503, "unchanged")
