"""Schemathesis over the whole OpenAPI document: whatever is sent, no 5xx and no hanging server."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from qwen_image_tool.server.run import build
from running import BEARER, Live, server

EXAMPLES = int(os.environ.get("QIT_EXAMPLES", "4"))  # of each route
# News never end; a pause would make every later request wait; these answer 501; and this one asks
# torch for seconds
LEFT_OUT = (
    "/api/events",
    "/api/queue/pause",
    "/v1/images/edits",
    "/v1/images/variations",
    "/sdapi/v1/img2img",
    "/api/system/checks",
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


def operations() -> list[Any]:
    """Of the document, which needs no service."""
    nobody: Any = None
    whole = schemathesis.openapi.from_dict(build(nobody, nobody).openapi())
    found: Any = whole.exclude(path=list(LEFT_OUT)).get_all_operations()
    return [operation.ok() for operation in found]


@pytest.mark.parametrize("operation", operations(), ids=lambda op: op.label)
def test_no_request_breaks_the_server(live: Live, operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        answer = case.call(base_url=live.url, headers=BEARER, timeout=60)
        assert answer.status_code < 500, answer.text

    run()


def test_what_is_left_out_exists(live: Live) -> None:
    paths = live.http.get("/api/openapi.json").json()["paths"]
    assert set(LEFT_OUT) <= set(paths)
