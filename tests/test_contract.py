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
from tests.helpers import ADA, FOREVER, HERE, LINE, MAX, SECRET, line, lines_of, path, reconnected, signed, token_for

DOCUMENT = yaml.safe_load((HERE / "openapi.yaml").read_text())
contract = schemathesis.openapi.from_dict(DOCUMENT)


@contract.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))  # our fixtures may be slow
def test_the_service_keeps_its_contract(case, site):
    """Send a random request, valid or not, and compare the answer with the contract."""
    excluded = []
    if "Idempotency-Key" in (case.headers or {}):
        excluded.append(positive_data_acceptance)  # a valid one is refused if its key was used with another body
        excluded.append(negative_data_rejection)  # one of 256 characters is accepted if it ends with a quote
    case.call_and_validate(base_url=site.url, excluded_checks=excluded)


def test_a_cart_is_read_as_the_contract_has_it(site):
    site.change()

    response = site.get()

    assert response.status_code == 200
    contract["/cart/users/{user_id}"]["GET"].validate_response(response)  # which raises if it is not


# The examples of refusals, by method and name


def read_examples():
    """Return the document of each: {("POST", "full"): {"status": 409, ...}, ...}.

    The contract has `post: {responses: {'409': {$ref: '#/components/responses/Conflict'}}}`, the response Conflict has
    the names of its examples, and the documents are in components/examples.
    """
    documents = {name: example["value"] for name, example in DOCUMENT["components"]["examples"].items()}
    examples = {}
    for method in ("post", "patch", "get", "delete"):
        for status, reference in DOCUMENT["paths"]["/cart/users/{user_id}"][method]["responses"].items():
            if status != "200":
                response = DOCUMENT["components"]["responses"][reference["$ref"].rpartition("/")[2]]
                for name in response["content"]["application/problem+json"]["examples"]:
                    examples[method.upper(), name] = documents[name]
    return examples


EXAMPLES = read_examples()
AS_ADA = token_for("ada")
AS_BOB = token_for("bob")
USED_KEY = {**AS_ADA, "Idempotency-Key": "k"}


@pytest.fixture
def full(guarded):
    """A client of the service that asks for tokens, and ada's cart is full, by a change with USED_KEY."""
    lines_of(guarded.post(ADA, json=[line(f"{n:03}", 2) for n in range(500)], headers=USED_KEY))
    return guarded


# The name of an example, and path, headers and body of a request that is answered by it. It is sent by each method that
# has the example in openapi.yaml. GET and DELETE ignore the body.
BY_A_REQUEST = {
    "not_json": (ADA, AS_ADA, '{"product_id": "p"'),
    "not_said_json": (ADA, {**AS_ADA, "Content-Type": "text/plain"}, "{}"),
    "path_bytes": ("/cart/users/%ff", AS_ADA, LINE),
    "query_bytes": (f"{ADA}?product_id=%ff", AS_ADA, None),
    "key_length": (ADA, {**AS_ADA, "Idempotency-Key": ""}, LINE),
    "no_token": (ADA, {}, LINE),
    "expired": (ADA, token_for("ada", exp=1), LINE),
    "early": (ADA, token_for("ada", nbf=FOREVER - 1), LINE),
    "invalid_token": (ADA, signed({"sub": "ada", "exp": FOREVER}, SECRET[1:]), LINE),
    "other_user": (ADA, AS_BOB, LINE),
    "no_cart": (path("bob"), AS_BOB, None),
    "no_line": (f"{ADA}?product_id=p", AS_ADA, None),
    "total": (ADA, AS_ADA, line("001", MAX)),
    "full": (ADA, AS_ADA, LINE),
    "full_line": (ADA, AS_ADA, [line("001"), LINE]),
    "no_change": (ADA, AS_ADA, '"p"'),
    "product_id": (ADA, AS_ADA, line("")),
    "query_product_id": (f"{ADA}?product_id=", AS_ADA, None),
    "user_id": (path("x" * 256), AS_ADA, LINE),
    "quantity": (ADA, AS_ADA, '{"product_id": "p", "quantity": 1.5}'),
    "quantity_zero": (ADA, AS_ADA, line("p", 0)),
    "quantity_negative": (ADA, AS_ADA, line("p", -1)),
    "quantity_line": (ADA, AS_ADA, [LINE, line("p", 2**31)]),
    "list_length": (ADA, AS_ADA, "[]"),
    "key_reuse": (ADA, USED_KEY, LINE),
    "query": (f"{ADA}?product=p", AS_ADA, None),
}
BY_THE_PROXY = ["bad_request", "too_large", "unknown"]


def no_database():
    return reconnected(host="127.0.0.1", port="1")


def no_issuer():
    return mock.patch.object(tokens, "ISSUER", tokens.IssuerKeys("http://127.0.0.1:1/keys"))


def no_place():
    """Take all places of ada's cart, which run_locking finds by the tuple of its first value."""
    return mock.patch.multiple(database, cart_places={("ada",): BoundedSemaphore(0)}, QUEUE_TIMEOUT=0.01)


FAULTS = {"database": no_database, "issuer": no_issuer, "too_many": no_place}


def examples_of(names):
    """Return the methods and names of the examples that have one of these names."""
    return [(method, name) for method, name in EXAMPLES if name in names]


@pytest.mark.parametrize(("method", "name"), examples_of(BY_A_REQUEST))
def test_an_example_of_a_refusal_is_what_is_answered(full, method, name):
    target, headers, body = BY_A_REQUEST[name]
    data = body if isinstance(body, str) else json.dumps(body)

    response = full.open(target, method=method, headers={"Content-Type": "application/json", **headers}, data=data)

    assert response.get_json() == EXAMPLES[method, name]


@pytest.mark.parametrize(("method", "name"), examples_of(FAULTS))
def test_the_example_of_a_fault_is_what_is_answered_in_it(guarded, method, name):
    with FAULTS[name]():
        response = guarded.open(ADA, method=method, headers=AS_ADA, json=LINE)

    assert response.get_json() == EXAMPLES[method, name]


@pytest.mark.parametrize(("method", "name"), examples_of(BY_THE_PROXY))
def test_an_example_of_the_proxys_is_what_nginx_conf_says(method, name):
    assert EXAMPLES[method, name]["detail"] in (HERE / "nginx.conf").read_text()


def test_each_example_has_a_test_and_each_code_an_example():
    assert {name for _, name in EXAMPLES} == {*BY_A_REQUEST, *FAULTS, *BY_THE_PROXY}
    codes = DOCUMENT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert {document["code"] for document in EXAMPLES.values() if "code" in document} == set(codes)


# What is open to all


def fetch(client, target):
    """Return what is there, without a token."""
    response = client.get(target)
    assert response.status_code == 200 and response.data
    response.close()  # it may come from a file, which it leaves open
    return response


@pytest.mark.parametrize("target", ["/docs", "/docs/"])
def test_the_page_shows_the_contract_and_takes_nothing_from_elsewhere(guarded, target):
    page = fetch(guarded, target)
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)

    assert '"url": "/openapi.yaml"' in page.text
    assert links
    for link in links:
        fetch(guarded, link)


def test_the_contract_is_served(guarded):
    served = fetch(guarded, "/openapi.yaml")

    assert served.content_type == "application/yaml"
    assert served.data == (HERE / "openapi.yaml").read_bytes()
