"""The contract: openapi.yaml, and the page that shows it.

Kept here: the contract is true and drives the tests, each example of a refusal is what is answered, and /docs shows it.
"""

import json
import re
from unittest import mock

import pytest
import schemathesis
import yaml
from gevent.lock import BoundedSemaphore
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

import database
import tokens
from tests.helpers import ADA, FOREVER, HERE, LINE, MAX, SECRET, line, lines_of, path, reconnected, signed

# Requests that are made of the contract

contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case, site):
    # A key is rightly refused with a body other than that of an earlier case, whatever the schema says of the data.
    # Blanks and quotes around a key do not count, so one that is too long for the schema may be right.
    of_keys = [positive_data_acceptance, negative_data_rejection] if "Idempotency-Key" in (case.headers or {}) else []
    case.call_and_validate(base_url=site.url, excluded_checks=of_keys)


# The examples of refusals


CONTRACT = yaml.safe_load((HERE / "openapi.yaml").read_text())


def read_examples():
    """Return the document of each example of a refusal, by its method and its name."""
    examples = {}
    for method in ("post", "patch", "get", "delete"):
        for status, response in CONTRACT["paths"]["/cart/users/{user_id}"][method]["responses"].items():
            if status != "200":
                named = CONTRACT["components"]["responses"][response["$ref"].rpartition("/")[2]]
                for name in named["content"]["application/problem+json"]["examples"]:
                    examples[method.upper(), name] = CONTRACT["components"]["examples"][name]["value"]
    return examples


OWNER = {"sub": "ada", "exp": FOREVER, "aud": "carts"}
AS_OWNER = signed(OWNER)
AS_BOB = signed({**OWNER, "sub": "bob"})
USED_KEY = {**AS_OWNER, "Idempotency-Key": "k"}
BY_A_REQUEST = {  # its path, headers and body
    "not_json": (ADA, AS_OWNER, '{"product_id": "p"'),
    "not_said_json": (ADA, {**AS_OWNER, "Content-Type": "text/plain"}, "{}"),
    "path_bytes": ("/cart/users/%ff", AS_OWNER, LINE),
    "query_bytes": (f"{ADA}?product_id=%ff", AS_OWNER, None),
    "key_length": (ADA, {**AS_OWNER, "Idempotency-Key": ""}, LINE),
    "no_token": (ADA, {}, LINE),
    "expired": (ADA, signed({**OWNER, "exp": 1}), LINE),
    "early": (ADA, signed({**OWNER, "nbf": 3_900_000_000}), LINE),
    "invalid_token": (ADA, signed(OWNER, SECRET[1:]), LINE),
    "other_user": (ADA, AS_BOB, LINE),
    "no_cart": (path("bob"), AS_BOB, None),
    "no_line": (f"{ADA}?product_id=p", AS_OWNER, None),
    "total": (ADA, AS_OWNER, line("001", MAX)),
    "full": (ADA, AS_OWNER, LINE),
    "full_line": (ADA, AS_OWNER, [line("001"), LINE]),
    "no_change": (ADA, AS_OWNER, '"p"'),
    "product_id": (ADA, AS_OWNER, line("")),
    "query_product_id": (f"{ADA}?product_id=", AS_OWNER, None),
    "user_id": (path("x" * 256), AS_OWNER, LINE),
    "quantity": (ADA, AS_OWNER, '{"product_id": "p", "quantity": 1.5}'),
    "quantity_zero": (ADA, AS_OWNER, line("p", 0)),
    "quantity_negative": (ADA, AS_OWNER, line("p", -1)),
    "quantity_line": (ADA, AS_OWNER, [LINE, line("p", 2**31)]),
    "list_length": (ADA, AS_OWNER, "[]"),
    "key_reuse": (ADA, USED_KEY, LINE),
    "query": (f"{ADA}?product=p", AS_OWNER, None),
}
BY_THE_PROXY = ["bad_request", "too_large", "unknown"]
BY_A_FAULT = ["database", "issuer", "too_many"]
EXAMPLES = read_examples()


def having(names):
    """Mark a test that runs for each method that has an example with one of these names."""
    return pytest.mark.parametrize(("method", "name"), [one for one in EXAMPLES if one[1] in names])


@pytest.fixture
def full(guarded):
    """A client of the service that asks for tokens, and ada's cart is full, by a change with the key k."""
    lines_of(guarded.post(ADA, json=[line(f"{n:03}", 2) for n in range(500)], headers=USED_KEY))
    return guarded


@having(BY_A_REQUEST)
def test_an_example_of_a_refusal_is_what_is_answered(full, method, name):
    target, headers, body = BY_A_REQUEST[name]
    data = body if isinstance(body, str) else json.dumps(body)

    response = full.open(target, method=method, headers={"Content-Type": "application/json", **headers}, data=data)

    assert response.get_json() == EXAMPLES[method, name]


@having(["database"])
def test_the_example_of_a_database_that_is_away_is_what_is_answered(guarded, method, name):
    with reconnected(host="127.0.0.1", port="1"):
        response = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert response.get_json() == EXAMPLES[method, name]


@having(["issuer"])
def test_the_example_of_an_issuer_that_is_away_is_what_is_answered(guarded, method, name):
    with mock.patch.object(tokens, "ISSUER", tokens.IssuerKeys("http://127.0.0.1:1/keys")):
        response = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert response.get_json() == EXAMPLES[method, name]


@having(["too_many"])
def test_the_example_of_a_cart_without_a_place_is_what_is_answered(guarded, method, name):
    with mock.patch.multiple(database, cart_places={("ada",): BoundedSemaphore(0)}, QUEUE_TIMEOUT=0.01):
        response = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert response.get_json() == EXAMPLES[method, name]


@having(BY_THE_PROXY)
def test_an_example_of_the_proxys_is_what_nginx_conf_says(method, name):
    assert EXAMPLES[method, name]["detail"] in (HERE / "nginx.conf").read_text()


def test_each_example_has_a_test_and_each_code_an_example():
    assert {name for _, name in EXAMPLES} == {*BY_A_REQUEST, *BY_A_FAULT, *BY_THE_PROXY}
    codes = CONTRACT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert {document["code"] for document in EXAMPLES.values() if "code" in document} == set(codes)


# What is open to all


def fetch(client, target):
    """Return what is there, without a token."""
    response = client.get(target)
    assert response.status_code == 200 and response.data
    response.close()  # the file that it came from
    return response


@pytest.mark.parametrize("target", ["/docs", "/docs/"])
def test_the_page_shows_the_contract_and_takes_nothing_from_elsewhere(guarded, target):
    page = fetch(guarded, target)
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)

    assert '"url": "/openapi.yaml"' in page.text
    assert links and all(fetch(guarded, link) for link in links)


def test_the_contract_is_served(guarded):
    served = fetch(guarded, "/openapi.yaml")

    assert served.content_type == "application/yaml"
    assert served.data == (HERE / "openapi.yaml").read_bytes()


@pytest.mark.parametrize("target", ["/healthz", "/livez"])
def test_probes_need_no_token(guarded, target):
    assert fetch(guarded, target).get_json() == {"status": "ok"}
