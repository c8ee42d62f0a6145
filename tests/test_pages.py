"""Pages of other origins, in browsers: CORS of the service and of the proxy.

Kept here: pages of the named origins can read every answer, the proxy's refusals too, and nobody else's can. Nothing
about a cart is shown from a cache.
"""

import pytest

from tests.helpers import ADA, LINE, ORIGINS, UNKNOWN, Service, assert_problem, free_port, nginx, token_for

ASKED = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "idempotency-key"}
OTHERS = ["http://1:3000", "https://shop.example.evil", "https://shopxexample", "http://shop.example", "null"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_a_named_origin_may_call(guarded_site: Service, origin: str) -> None:
    allowed = guarded_site.request("OPTIONS", ADA, headers={"Origin": origin, **ASKED})

    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == origin
    assert allowed.headers["Access-Control-Allow-Methods"] == "DELETE, GET, PATCH, POST"
    assert allowed.headers["Access-Control-Allow-Headers"] == "idempotency-key"


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_a_named_origin_can_read_answers_and_refusals(guarded_site: Service, origin: str) -> None:
    made = guarded_site.request("POST", ADA, json=LINE, headers={"Origin": origin, **token_for("ada")})
    refused = guarded_site.request("POST", ADA, json=LINE, headers={"Origin": origin})

    assert [made.status_code, refused.status_code] == [200, 401]
    for answer in (made, refused):
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After, WWW-Authenticate, X-Request-Id"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
@pytest.mark.parametrize("origin", OTHERS)
def test_a_page_of_another_origin_may_not_call(guarded_site: Service, method: str, origin: str) -> None:
    answer = guarded_site.request(method, ADA, headers={"Origin": origin, **ASKED, **token_for("ada")})

    assert "Access-Control-Allow-Origin" not in answer.headers


REFUSALS = [
    pytest.param(413, "POST", ADA, b"x" * 1048577, id="large body"),
    pytest.param(405, "TRACE", ADA, None, id="TRACE"),
    pytest.param(414, "GET", f"/{'x' * 9000}", None, id="long path"),
    pytest.param(404, "GET", "/problem", None, id="the proxy's own page"),
]


@pytest.mark.parametrize(("status", "method", "target", "body"), REFUSALS)
def test_a_page_can_read_what_the_proxy_refuses(
    guarded_site: Service, status: int, method: str, target: str, body: bytes | None
) -> None:
    refused = guarded_site.request(method, target, data=body, headers={"Origin": ORIGINS[0]})

    assert_problem(refused, status)
    assert refused.headers["Access-Control-Allow-Origin"] == "*"
    assert refused.headers["Access-Control-Expose-Headers"] == "Retry-After, X-Request-Id"


def test_a_page_can_read_that_the_service_is_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    with nginx(tmp_path_factory.mktemp("away"), f"http://127.0.0.1:{free_port()}") as proxy:
        away = proxy.post()

    assert_problem(away, 503, "unknown", UNKNOWN)
    assert away.headers["Access-Control-Allow-Origin"] == "*"
    assert away.headers["Access-Control-Expose-Headers"] == "Retry-After, X-Request-Id"
