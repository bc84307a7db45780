"""Schemathesis over the whole OpenAPI document; benchmarks/app.py sends more of it."""

from collections.abc import Iterator
from typing import Any

import pytest

from running import Live, server
from strangers import LEFT_OUT, odd_requests, operations

EXAMPLES = 4  # of each route


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.mark.parametrize("operation", operations(), ids=lambda op: op.label)
def test_no_request_breaks_the_server(live: Live, operation: Any) -> None:
    tally = odd_requests(live, operation, EXAMPLES)
    assert tally.tried > 0
    assert tally.wrong == []


def test_what_is_left_out_exists(live: Live) -> None:
    paths = live.http.get("/api/openapi.json").json()["paths"]
    assert set(LEFT_OUT) <= set(paths)
