"""What every tab is made with: who may do what only this computer may; words as HTML."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.server.run import own_addresses
from qwen_image_tool.ui import kit
from qwen_image_tool.ui.words import load_words


def asked_by(host: str) -> Any:
    http = cast("Any", SimpleNamespace(client=SimpleNamespace(host=host)))
    return kit._from_here(http, lambda: "done")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", own_addresses()[-1]])
def test_this_computer_may(host: str) -> None:
    assert asked_by(host)() == "done"


@pytest.mark.parametrize("host", ["203.0.113.9", "", "127.0.0.1.example"])
def test_another_computer_may_not(host: str) -> None:
    with pytest.raises(BadRequest, match="only on the computer that QwenImageTool runs on"):
        asked_by(host)()


def test_what_stands_in_backticks_is_code() -> None:
    said = "`qit models get <name> --force` fetches it & no ` else, --size 64x64."
    as_html = (
        "<code>qit models get &lt;name&gt; --force</code> fetches it &amp; no ` else, size 64x64."
    )
    assert kit.told(load_words("en"), said) == as_html
