"""Requests made from the server's own description: only answers that it announces, none that tells too much."""

from typing import cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.test_pictures import LEAKS


@pytest.fixture(scope="module")
def description(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),  # typed as its own metaclass
    )


def answered(case):
    found = case.call()
    checks = [status_code_conformance, response_schema_conformance, content_type_conformance]
    case.validate_response(found, checks=[not_a_server_error, *checks])
    if found.status_code != 200:
        assert not LEAKS.search(found.text), found.text
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def run(description, count):
    """Every operation with ``count`` requests that fit its description, and as many that do not."""
    tried = []
    for operation in (found.ok() for found in description.get_all_operations()):
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not len(operation.body):
                continue  # nothing of it can be wrong

            @examples(count)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                answered(case)

            ask()
        tried.append(operation.path)
    return tried


def test_generated_requests(description):
    paths = run(description, 8)
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/health"} <= set(paths)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_generated_requests(description):
    run(description, 1_000)
