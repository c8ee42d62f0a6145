"""The contract: openapi.yaml, and the page that shows it.

Kept here: the contract is true and drives the tests, each example of a refusal is what the service answers, and /docs
shows it.
"""

import json
import re
from functools import reduce
from typing import Any
from unittest import mock

import pytest
import schemathesis
import yaml
from flask.testing import FlaskClient
from gevent.lock import BoundedSemaphore
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from werkzeug.test import TestResponse

import database
import tokens
from tests.helpers import ADA, HERE, LINE, MAX, SECRET, Site, line, lines_of, path, reconnected, signed

# Requests that are made of the contract

contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], site: Site) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=site.url, excluded_checks=[positive_data_acceptance] if keyed else [])


# The examples of refusals

CONTRACT = yaml.safe_load((HERE / "openapi.yaml").read_text())
BY_THE_PROXY = {"bad_request", "too_large", "unknown"}


def resolve(node: dict[str, Any]) -> Any:
    """Return what a reference of the contract means."""
    return reduce(dict.__getitem__, node["$ref"].removeprefix("#/").split("/"), CONTRACT)


def read_examples() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the document of each example of a refusal, by its method and its name."""
    return {
        (method.upper(), name): resolve(example)["value"]
        for method, operation in CONTRACT["paths"]["/cart/users/{user_id}"].items()
        if method != "parameters"
        for status, response in operation["responses"].items()
        if status != "200"
        for name, example in resolve(response)["content"]["application/problem+json"]["examples"].items()
    }


EXAMPLES = read_examples()
OWNER = {"sub": "ada", "exp": 4_000_000_000, "aud": "carts"}
AS_OWNER = signed(OWNER)
AS_BOB = signed({**OWNER, "sub": "bob"})
USED_KEY = {**AS_OWNER, "Idempotency-Key": "k"}
LONG = path("x" * 256)

# How each comes about: its methods and name, the path, the headers, the body.
REFUSALS = [
    ("POST PATCH", "not_json", ADA, AS_OWNER, '{"product_id": "p"'),
    ("POST PATCH", "not_said_json", ADA, {**AS_OWNER, "Content-Type": "text/plain"}, "{}"),
    ("POST PATCH GET DELETE", "path_bytes", "/cart/users/%ff", AS_OWNER, LINE),
    ("DELETE", "query_bytes", f"{ADA}?product_id=%ff", AS_OWNER, None),
    ("POST PATCH", "key_length", ADA, {**AS_OWNER, "Idempotency-Key": ""}, LINE),
    ("POST PATCH GET DELETE", "no_token", ADA, {}, LINE),
    ("POST PATCH GET DELETE", "expired", ADA, signed({**OWNER, "exp": 1}), LINE),
    ("POST PATCH GET DELETE", "early", ADA, signed({**OWNER, "nbf": 3_900_000_000}), LINE),
    ("POST PATCH GET DELETE", "invalid_token", ADA, signed(OWNER, SECRET[1:]), LINE),
    ("POST PATCH GET DELETE", "other_user", ADA, AS_BOB, LINE),
    ("GET DELETE", "no_cart", path("bob"), AS_BOB, None),
    ("DELETE", "no_line", f"{ADA}?product_id=p", AS_OWNER, None),
    ("POST", "total", ADA, AS_OWNER, line("001", MAX)),
    ("POST PATCH", "full", ADA, AS_OWNER, LINE),
    ("POST PATCH", "full_line", ADA, AS_OWNER, [line("001"), LINE]),
    ("POST PATCH", "no_change", ADA, AS_OWNER, '"p"'),
    ("POST PATCH", "product_id", ADA, AS_OWNER, line("")),
    ("DELETE", "query_product_id", f"{ADA}?product_id=", AS_OWNER, None),
    ("POST PATCH GET DELETE", "user_id", LONG, AS_OWNER, LINE),
    ("POST", "quantity", ADA, AS_OWNER, '{"product_id": "p", "quantity": 1.5}'),
    ("POST", "quantity_zero", ADA, AS_OWNER, line("p", 0)),
    ("PATCH", "quantity_negative", ADA, AS_OWNER, line("p", -1)),
    ("POST PATCH", "quantity_line", ADA, AS_OWNER, [LINE, line("p", 2**31)]),
    ("POST PATCH", "list_length", ADA, AS_OWNER, "[]"),
    ("POST PATCH", "key_reuse", ADA, USED_KEY, LINE),
    ("DELETE", "query", f"{ADA}?product=p", AS_OWNER, None),
]
REFUSALS_BY_METHOD = [
    pytest.param(method, *refusal, id=f"{method} {refusal[0]}")
    for methods, *refusal in REFUSALS
    for method in methods.split()
]
CHANGES, ALL = ["POST", "PATCH", "DELETE"], ["POST", "PATCH", "GET", "DELETE"]


@pytest.fixture
def full(guarded: FlaskClient) -> FlaskClient:
    """A client of the service that asks for tokens, and ada's cart is full, by a change with the key k."""
    lines_of(guarded.post(ADA, json=[line(f"{n:03}", 2) for n in range(500)], headers=USED_KEY))
    return guarded


@pytest.mark.parametrize(("method", "name", "target", "headers", "body"), REFUSALS_BY_METHOD)
def test_an_example_of_a_refusal_is_what_is_answered(
    full: FlaskClient, method: str, name: str, target: str, headers: dict[str, str], body: Any
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    data = body if isinstance(body, str) else json.dumps(body)

    assert full.open(target, method=method, headers=headers, data=data).get_json() == EXAMPLES[method, name]


@pytest.mark.parametrize("method", ALL)
def test_the_example_of_a_database_that_is_away_is_what_is_answered(guarded: FlaskClient, method: str) -> None:
    with reconnected(host="127.0.0.1", port="1"):
        answer = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert answer.get_json() == EXAMPLES[method, "database"]


@pytest.mark.parametrize("method", ALL)
def test_the_example_of_an_issuer_that_is_away_is_what_is_answered(guarded: FlaskClient, method: str) -> None:
    with mock.patch.object(tokens, "ISSUER", tokens.IssuerKeys("http://127.0.0.1:1/keys")):
        answer = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert answer.get_json() == EXAMPLES[method, "issuer"]


@pytest.mark.parametrize("method", CHANGES)
def test_the_example_of_a_cart_without_a_place_is_what_is_answered(guarded: FlaskClient, method: str) -> None:
    places = {("ada",): BoundedSemaphore(0)}
    with mock.patch.multiple(database, cart_places=places, QUEUE_TIMEOUT=0.01):
        answer = guarded.open(ADA, method=method, headers=AS_OWNER, json=LINE)

    assert answer.get_json() == EXAMPLES[method, "too_many"]


def test_each_example_of_a_refusal_is_tested_or_the_proxys() -> None:
    tested = {(method, name) for methods, name, *_ in REFUSALS for method in methods.split()}
    tested |= {(method, name) for method in ALL for name in ("database", "issuer")}
    tested |= {(method, "too_many") for method in CHANGES}
    left = EXAMPLES.keys() - tested
    proxy = (HERE / "nginx.conf").read_text()

    assert tested <= EXAMPLES.keys()
    assert {name for _, name in left} == BY_THE_PROXY
    assert all(EXAMPLES[one]["detail"] in proxy for one in left)


# The page that shows it


def fetch(client: FlaskClient, target: str) -> TestResponse:
    """Return what is there, without a token."""
    response = client.get(target)
    assert response.status_code == 200 and response.data
    response.close()  # the file that it came from
    return response


@pytest.mark.parametrize("target", ["/docs", "/docs/"])
def test_the_page_shows_the_contract_and_takes_nothing_from_elsewhere(guarded: FlaskClient, target: str) -> None:
    page = fetch(guarded, target)
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)

    assert b'"url": "/openapi.yaml"' in page.data
    assert links and all(fetch(guarded, link) for link in links)


def test_the_contract_is_served(guarded: FlaskClient) -> None:
    contract = fetch(guarded, "/openapi.yaml")

    assert contract.content_type == "application/yaml"
    assert contract.data == (HERE / "openapi.yaml").read_bytes()


@pytest.mark.parametrize("target", ["/healthz", "/livez"])
def test_probes_need_no_token(guarded: FlaskClient, target: str) -> None:
    assert fetch(guarded, target).get_json() == {"status": "ok"}
