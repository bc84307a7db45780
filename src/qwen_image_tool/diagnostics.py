"""What somebody who helps needs to know, as text, without what is nobody's business."""

import getpass
import platform
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from qwen_image_tool import __version__
from qwen_image_tool.doctor import Check
from qwen_image_tool.feed import QueueState
from qwen_image_tool.gauges import Gauge
from qwen_image_tool.logs import LogEntry
from qwen_image_tool.settings import Settings
from qwen_image_tool.types import Device

LOG_LINES = 60
NOT_SECRET = ("root", "user", "admin", "localhost")  # names that say nothing of anybody
SECRETS = (  # keys in texts, and what stands for them
    (r"hf_[A-Za-z0-9]{8,}", "hf_***"),
    (r"(?i)(__t=|bearer\s+|api[-_]?key[=:]\s*)[^\s&\"']+", r"\1***"),
    (r"(?i)(://)[^/\s@]+@", r"\1***@"),
    (r"\beyJ[A-Za-z0-9_-]{10,}(\.[A-Za-z0-9_-]+)*", "***"),
)


def report(
    settings: Settings,
    checks: Iterable[Check],
    device: Device | None,
    gauges: Iterable[Gauge],
    queue: QueueState,
    models: Iterable[str],
    log: Iterable[LogEntry],
) -> str:
    """All of it, as it is. `models`: one line each."""
    parts = {
        "QwenImageTool": [f"{__version__}, Python {platform.python_version()}"],
        "System": [f"{platform.platform()}, {platform.machine()}"],
        "Device": [device.to_json()] if device else ["not looked at"],
        "Now": [_gauge(gauge) for gauge in gauges],
        "Queue": [queue.to_json()],
        "Checks": [f"{each.status}: {each.name}: {each.finding}" for each in checks],
        "Settings": [f"{name} = {value}" for name, value in settings],
        "Models": list(models),
        "Log": [entry.text for entry in log],
    }
    return "\n\n".join("\n".join([f"## {name}", *lines]) for name, lines in parts.items()) + "\n"


def discreet(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, what looks like a key, and what names the user: the folder, the
    account, the computer."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    for pattern, instead in SECRETS:
        text = re.sub(pattern, instead, text)
    return without_names(text, Path.home(), _user(), socket.gethostname())


def without_names(text: str, home: Path, user: str, host: str) -> str:
    """`~` for the home folder, however its path is written; USER and HOST for the names."""
    written = {str(home), home.as_posix(), str(home).replace("\\", "\\\\")}
    for path in sorted(written - {"/"}, key=len, reverse=True):
        text = re.sub(re.escape(path) + r"(?![\w.-])", "~", text, flags=re.IGNORECASE)
    text = re.sub(r"(?i)([/\\](?:home|users)[/\\]+)(?!public\b)[^/\\\s\"':]+", r"\1USER", text)
    for name, instead in ((host, "HOST"), (host.partition(".")[0], "HOST"), (user, "USER")):
        if len(name) > 1 and name.lower() not in NOT_SECRET:
            text = re.sub(rf"(?i)(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an account without a name
        return ""


def _gauge(gauge: Gauge) -> str:
    name, on_disk = gauge.where or gauge.kind, gauge.kind == "disk"
    unit, size = ("GB", 1e9) if on_disk else ("GiB", 2**30)
    return f"{name}: {gauge.free_bytes / size:.1f} of {gauge.total_bytes / size:.1f} {unit} free"
