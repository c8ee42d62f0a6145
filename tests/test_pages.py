"""Pages of other origins, in browsers: CORS of the service. That of the proxy's own refusals is in test_nginx.py.

Kept here: pages of the named origins can read every answer, and nobody else's can.
"""

import pytest

from tests.helpers import ADA, LINE, ORIGINS, token_for

PREFLIGHT = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "idempotency-key"}
OTHERS = [
    "http://1:3000",  # which http://[::1]:3000 matches as a pattern
    "https://shopxexample",  # which https://shop.example matches as a pattern
    "https://shop.example.evil",
    "http://shop.example",
    "null",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_a_named_origin_may_call(guarded_site, origin):
    allowed = guarded_site.request("OPTIONS", ADA, headers={"Origin": origin, **PREFLIGHT})

    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == origin
    assert allowed.headers["Access-Control-Allow-Methods"] == "DELETE, GET, PATCH, POST"
    assert allowed.headers["Access-Control-Allow-Headers"] == "idempotency-key"


@pytest.mark.parametrize(("token", "status"), [(token_for("ada"), 200), ({}, 401)], ids=["an answer", "a refusal"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_a_named_origin_can_read(guarded_site, origin, token, status):
    answer = guarded_site.request("POST", ADA, json=LINE, headers={"Origin": origin, **token})

    assert answer.status_code == status
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After, WWW-Authenticate, X-Request-Id"


@pytest.mark.parametrize("origin", OTHERS)
def test_a_page_of_another_origin_may_neither_call_nor_read(guarded_site, origin):
    preflight = guarded_site.request("OPTIONS", ADA, headers={"Origin": origin, **PREFLIGHT})
    answer = guarded_site.request("POST", ADA, json=LINE, headers={"Origin": origin, **token_for("ada")})

    assert (preflight.status_code, answer.status_code) == (200, 200)
    assert "Access-Control-Allow-Origin" not in {**preflight.headers, **answer.headers}
