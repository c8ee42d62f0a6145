"""Tokens and the issuer's keys: tokens.py.

Kept here: with tokens only the cart's owner, or carts:all, gets in. The issuer's keys rotate without a restart. Known
keys go on while the issuer is away or answers nonsense, and wait half a second for it at most.
"""

import base64
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm, HMACAlgorithm

import tokens
from settings import SETTINGS
from tests.helpers import (
    ADA,
    FOREVER,
    PRIVATE_KEYS,
    SECRET,
    assert_problem,
    eventually,
    gunicorn,
    key_set,
    public_key,
    signed,
    token_for,
)

LET_IN = 404  # ada's cart is empty
HOUR = 3600
CLAIMS = {
    "for the user": (LET_IN, {"sub": "ada", "exp": FOREVER}),
    "for all carts": (LET_IN, {"sub": "shop", "exp": FOREVER, "scope": "x carts:all"}),
    "for all carts, without sub": (LET_IN, {"exp": FOREVER, "scope": "carts:all"}),
    "without exp": (401, {"sub": "ada"}),
    "for a service": (401, {"sub": "ada", "exp": FOREVER, "aud": "carts"}),
    "for a user in capitals": (403, {"sub": "Ada", "exp": FOREVER}),
    "without sub": (403, {"exp": FOREVER}),
    "with a scope that ends alike": (403, {"sub": "b", "exp": FOREVER, "scope": "xcarts:all"}),
    "with a list as scope": (403, {"sub": "b", "exp": FOREVER, "scope": ["carts:all"]}),
}
TIMES = {  # in seconds from now: the issuer's clock may be ahead by 30
    "not yet valid on a clock that is ahead": (LET_IN, "nbf", 29),
    "issued on a clock that is ahead": (LET_IN, "iat", 29),
    "not yet valid": (401, "nbf", 40),
    "expired": (401, "exp", -1),
}
NO_TOKENS = {
    "another scheme": "Basic eA==",
    "not ASCII": "Basic \xff",
    "a scheme alone": "Bearer",
    "not base64": "Bearer \xff.\xff.\xff",
    "a surrogate in the header": "Bearer " + jwt.encode({}, SECRET, headers={"crit": ["\ud800"]}),
    # Python's JSON fails with a RecursionError, of which PyJWT makes a DecodeError.
    "a deep header": f"Bearer {base64.urlsafe_b64encode(b'[' * 3000).decode()}.e30.x",
}


@pytest.mark.parametrize(("status", "claims"), CLAIMS.values(), ids=CLAIMS)
def test_a_token_lets_its_user_in(guarded, status, claims):
    assert guarded.get(ADA, headers=signed(claims)).status_code == status


@pytest.mark.parametrize(("status", "claim", "seconds"), TIMES.values(), ids=TIMES)
def test_a_token_lets_its_user_in_in_its_time(guarded, status, claim, seconds):
    token = token_for("ada", **{claim: time.time() + seconds})

    assert guarded.get(ADA, headers=token).status_code == status


@pytest.mark.parametrize(
    ("status", "audience"), [(LET_IN, "carts"), (LET_IN, ["x", "carts"]), (401, "else"), (401, [])]
)
def test_a_token_must_be_for_the_audience_that_is_set(guarded, monkeypatch, status, audience):
    monkeypatch.setattr(SETTINGS, "jwt_audience", "carts")

    assert guarded.get(ADA, headers=token_for("ada", aud=audience)).status_code == status


@pytest.mark.parametrize("sent", NO_TOKENS.values(), ids=NO_TOKENS)
def test_what_is_no_token_is_refused(guarded, sent):
    assert_problem(guarded.get(ADA, headers={"Authorization": sent}), 401)


@pytest.mark.parametrize(("sent", "challenge"), [("", "Bearer"), ("Bearer x.y.z", "Bearer error=invalid_token")])
def test_a_refusal_tells_a_missing_token_from_a_bad_one(guarded, sent, challenge):
    response = guarded.get(ADA, headers={"Authorization": sent})

    assert response.headers["WWW-Authenticate"].strip() == challenge


def test_the_scheme_is_read_in_any_letters_and_blanks(guarded):
    token = token_for("ada")["Authorization"].replace("Bearer", " bearer ")

    assert guarded.get(ADA, headers={"Authorization": token}).status_code == LET_IN


# The issuer's keys


def signed_by(key_id, algorithm="RS256", **claims):
    """Return the header with a token for ada that the issuer signed with one of its keys."""
    return signed({"sub": "ada", "exp": FOREVER, **claims}, PRIVATE_KEYS[key_id], algorithm, key_id)


ALGORITHMS = "PS384, RS256,ES256"


@pytest.fixture
def read(client, issuer, monkeypatch):
    """Read ada's cart, which is empty, with a token of the issuer, and return the status."""
    monkeypatch.setattr(tokens, "ISSUER", tokens.IssuerKeys(issuer.url))
    monkeypatch.setattr(tokens, "ALGORITHM", ALGORITHMS)

    def read_with(token):
        return client.get(ADA, headers=token).status_code

    return read_with


def test_a_token_must_name_the_issuer(read, issuer, monkeypatch):
    monkeypatch.setattr(SETTINGS, "jwt_issuer", "x")
    issuer.publish("a")

    assert read(signed_by("a", iss="x")) == LET_IN
    assert read(signed_by("a", iss="x", sub="bob")) == 403
    assert read(signed_by("a", iss="y")) == 401
    assert read(signed_by("a")) == 401


def test_a_new_key_of_the_issuer_is_fetched_ten_seconds_after_the_last_fetch(read, issuer, clock):
    issuer.publish("a")
    assert read(signed_by("a")) == LET_IN

    issuer.publish("a", "b")
    clock.advance(5)
    assert read(signed_by("b")) == 401
    assert issuer.asked == 1

    clock.advance(6)
    assert read(signed_by("b")) == LET_IN


NONSENSE = {
    "down": (503, ""),
    "a page": (200, "<html>"),
    "a list": (200, "[]"),
    "no key": (200, key_set()),
    "a key for encryption": (200, key_set(public_key("a", kid="e", use="enc"))),
    "a key without an id": (200, key_set(public_key("a"))),
}


@pytest.mark.parametrize(("issuers_status", "text"), NONSENSE.values(), ids=NONSENSE)
def test_without_a_known_key_an_issuer_that_is_away_or_odd_is_a_503(read, issuer, issuers_status, text):
    issuer.answer(text, issuers_status)
    assert read(signed_by("a")) == 503

    issuer.publish("a")
    assert read(signed_by("a")) == LET_IN  # a fetch that failed is repeated at once


@pytest.mark.parametrize(("issuers_status", "text"), NONSENSE.values(), ids=NONSENSE)
def test_known_keys_go_on_past_their_hour_while_the_issuer_is_away_or_odd(read, issuer, clock, issuers_status, text):
    issuer.publish("a", "b")
    assert read(signed_by("a")) == LET_IN

    issuer.answer(text, issuers_status)
    for seconds in (11, HOUR, 24 * HOUR):
        clock.advance(seconds)
        assert read(signed_by("a")) == LET_IN
        assert read(signed_by("b")) == LET_IN
        assert read(signed_by("c")) == 503  # nobody knows whether it exists


def test_a_revoked_key_ends_after_an_hour(read, issuer, clock):
    issuer.publish("a", "b")
    assert read(signed_by("a")) == LET_IN

    issuer.publish("b")
    clock.advance(HOUR - 100)
    assert read(signed_by("a")) == LET_IN
    assert issuer.asked == 1

    clock.advance(200)
    assert read(signed_by("a")) == 401
    assert read(signed_by("b")) == LET_IN
    assert issuer.asked == 2


def test_no_valid_token_waits_for_an_issuer_that_hangs(read, issuer, clock, background):
    issuer.publish("a")
    assert read(signed_by("a")) == LET_IN

    issuer.hang()
    clock.advance(11)
    unknown = background.submit(read, signed_by("b"))
    eventually(tokens.ISSUER.lock.locked)  # the issuer is being asked

    assert read(signed_by("a")) == LET_IN
    assert not unknown.done()
    issuer.recover()
    assert unknown.result() == 503  # the answer that hung has no keys


def test_requests_that_wait_for_a_fetch_that_fails_do_not_fetch_again(read, issuer, background):
    issuer.hang()
    first = background.submit(read, signed_by("a"))
    eventually(tokens.ISSUER.lock.locked)  # the issuer is being asked, until PyJWT gives up after two seconds

    others = [background.submit(read, signed_by("b")) for _ in range(3)]
    assert [one.result() for one in (first, *others)] == [503] * 4
    assert issuer.asked == 1


@pytest.mark.parametrize("algorithm", ["RS512", "PS256"])
def test_a_key_without_alg_works_with_the_algorithm_of_the_setting(read, issuer, monkeypatch, algorithm):
    monkeypatch.setattr(tokens, "ALGORITHM", algorithm)
    issuer.publish("a")

    assert read(signed_by("a", algorithm)) == LET_IN


# A set of several kinds of keys

EC_KEY = ec.generate_private_key(ec.SECP256R1())
MIXED_SET = [
    {**HMACAlgorithm.to_jwk(SECRET, as_dict=True), "kid": "secret"},
    {**ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True), "kid": "elliptic"},
    {"kty": "of no kind that is known", "kid": "unknown"},
    public_key("a", kid="a"),
]
# By what a token is signed, and the algorithm and the id of a key that its head names. One of the three is wrong.
MISUSES = {
    "the published secret": (SECRET, "HS256", "secret"),
    "no signature": (None, "none", "a"),
    "an algorithm that is not in ALGORITHMS": (PRIVATE_KEYS["a"], "PS256", "a"),
    "by the id of a key of another kind": (PRIVATE_KEYS["a"], "RS256", "elliptic"),
    "by the id of the secret": (PRIVATE_KEYS["a"], "RS256", "secret"),
    "elliptic, by the id of an RSA key": (EC_KEY, "ES256", "a"),
    "a stranger's key": (PRIVATE_KEYS["b"], "RS256", "a"),
    "without an id": (PRIVATE_KEYS["a"], "RS256", None),
    "an id that is not UTF-8": (PRIVATE_KEYS["a"], "RS256", "\ud800"),
}


@pytest.mark.parametrize(
    ("key", "algorithm", "key_id"), [(PRIVATE_KEYS["a"], "RS256", "a"), (EC_KEY, "ES256", "elliptic")]
)
def test_of_a_mixed_set_each_key_works_with_its_own_algorithm(read, issuer, key, algorithm, key_id):
    issuer.answer(key_set(*MIXED_SET))

    assert read(signed({"sub": "ada", "exp": FOREVER}, key, algorithm, key_id)) == LET_IN


@pytest.mark.parametrize(("key", "algorithm", "key_id"), MISUSES.values(), ids=MISUSES)
def test_a_mixed_set_lets_nobody_in_who_misuses_a_key(read, issuer, key, algorithm, key_id):
    issuer.answer(key_set(*MIXED_SET))

    assert read(signed({"sub": "ada", "exp": FOREVER}, key, algorithm, key_id)) == 401


# These need a real worker: gevent's timeouts (half a second for a known key, three for a fetch) have no effect in the
# threads of pytest. Above, a fetch ended by PyJWT's own timeout of two seconds.

HURRIED = """
import tokens
tokens.LIFESPAN = 0.5  # of keys, in seconds
from cart import app
"""


@pytest.fixture
def hurried(issuer, tmp_path):
    """The service as it is deployed, with an issuer, whose keys live half a second."""
    (tmp_path / "hurried.py").write_text(HURRIED)
    options = ["--pythonpath", str(tmp_path)]
    with gunicorn(tmp_path / "log", *options, app="hurried:app", JWT_JWKS_URL=issuer.url) as service:
        yield service


def test_a_silent_issuer_holds_up_no_known_key_for_more_than_half_a_second(hurried, issuer):
    issuer.publish("a")
    assert hurried.request("GET", ADA, headers=signed_by("a")).status_code == LET_IN

    issuer.hang()
    time.sleep(0.6)
    for timeout in (1, 0.4, 0.4):  # the first one waits for the issuer, who is still being asked when the others come
        assert hurried.request("GET", ADA, headers=signed_by("a"), timeout=timeout).status_code == LET_IN


def test_an_issuer_that_drips_is_given_up(hurried, issuer):
    issuer.drip()

    assert_problem(hurried.request("GET", ADA, headers=signed_by("a")), 503, "unchanged")
