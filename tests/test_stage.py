"""What the stage of Create says of a job."""

import pytest

from qwen_image_tool.feed import QueueState
from qwen_image_tool.jobs import Job
from qwen_image_tool.progress import Progress
from qwen_image_tool.types import PhaseName, Request
from qwen_image_tool.ui.stage import Scene, stage
from qwen_image_tool.ui.words import load_words


@pytest.mark.parametrize(
    ("phase", "told"), [("load", True), ("encode", True), ("denoise", False), ("decode", False)]
)
def test_bytes_are_told_while_weights_are_read(phase: PhaseName, told: bool) -> None:
    job = Job(
        id="a", number=1, state="running", request=Request(model="m", prompt="x"), created_at=0
    )
    progress = Progress(phase=phase, done_bytes=3 * 10**9, total_bytes=40 * 10**9)
    seen = Scene(job, progress, None, (), QueueState(counts={"queued": 0}))
    assert ("3.0 GB of 40.0 GB read" in stage(load_words("en"), seen)) is told
