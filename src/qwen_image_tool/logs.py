"""Where messages go: people read one line on stderr, the file keeps all with full tracebacks.

Nothing here touches stdout, which belongs to the results.
"""

import contextlib
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

OURS = "qwen_image_tool"
LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate")
FILE_BYTES = 1 << 20
OLD_FILES = 5
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LEVELS: tuple[Level, ...] = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_ENTRY = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ \d+ (?P<level>[A-Z]+) [\w.]+: ")

_log = logging.getLogger(__name__)


def log_path(folder: Path) -> Path:
    """The newest log file in the log folder; older ones end in .1 to .5."""
    return folder / "qit.log"


def set_up(folder: Path, verbose: bool = False) -> None:
    """Send our messages to stderr and everything to `log_path(folder)`; the last call counts.

    `verbose` adds our debug messages and the libraries' warnings to stderr. A log folder that can't
    be written costs one warning and no more.
    """
    root = logging.getLogger()
    tear_down()
    root.setLevel(logging.INFO)
    logging.getLogger(OURS).setLevel(logging.DEBUG)
    root.addHandler(_Console(verbose))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        root.addHandler(_File(log_path(folder)))
    except OSError as error:
        _log.warning("No log file is kept: %s.", error)
    logging.captureWarnings(True)
    adopt_libraries()


def adopt_libraries() -> None:
    """Take the libraries' own console handlers away. Call again after importing one of them:
    each adds its handler when it is imported."""
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def tear_down() -> None:
    """Undo `set_up`: close the file and give warnings back."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Console | _File)]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


class _Console(logging.Handler):
    """One line a message, without traceback."""

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        stderr = sys.stderr  # looked up each time: a progress bar stands in for it while it moves
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            if stderr is not None:  # a Windows program without a console has none
                stderr.write(self.format(record) + "\n")
                stderr.flush()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == OURS or record.name.startswith(OURS + "."):
            return record.levelno >= (logging.DEBUG if self.verbose else logging.INFO)
        captured = record.name == "py.warnings"
        return self.verbose and record.levelno >= logging.WARNING and not captured

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().splitlines())
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _File(RotatingFileHandler):
    """Several processes may write to it; one that can't write any more stops with one warning."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8")
        self.setFormatter(
            logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
        )

    def doRollover(self) -> None:  # noqa: N802
        if self.stream:
            self.stream.close()
        try:
            os.rename(self.baseFilename, self.baseFilename)  # noqa: PTH104
        except OSError:  # Windows, and another of our processes has the file open: grow instead
            self.stream = self._open()
        else:
            super().doRollover()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logging.getLogger().removeHandler(self)
            with contextlib.suppress(OSError):
                self.close()
            _log.warning("The log file is given up: %s.", error)
        else:
            super().handleError(record)


def record_failure(error: BaseException) -> None:
    """Keep the full traceback in the log file; the console shows the sentence alone."""
    _log.debug("The command failed.", exc_info=error)


@dataclass(frozen=True)
class LogEntry:
    """One message of the log file: `text` has its time and all its lines."""

    level: Level
    text: str


def tail(folder: Path, most: int, least: Level = "DEBUG", words: str = "") -> tuple[LogEntry, ...]:
    """The last `most` messages that are at `least` so grave and have all `words`, the newest last.
    Looks through the two newest files."""
    wanted, grave = words.casefold().split(), LEVELS[LEVELS.index(least) :]
    newest = log_path(folder)
    files = (newest.with_name(f"{newest.name}.1"), newest)
    entries = (entry for path in files for entry in _entries(path))
    kept = (
        entry
        for entry in entries
        if entry.level in grave and all(word in entry.text.casefold() for word in wanted)
    )
    return tuple(deque(kept, maxlen=most))


def _entries(path: Path) -> Iterator[LogEntry]:
    """A line that does not begin as a message does belongs to the one before."""
    level: Level | None = None
    lines: list[str] = []
    for line in _lines(path):
        if found := _ENTRY.match(line):
            if level:
                yield LogEntry(level, "\n".join(lines).rstrip())
            level = next((name for name in LEVELS if name == found["level"]), "INFO")
            lines = []
        lines.append(line)
    if level:
        yield LogEntry(level, "\n".join(lines).rstrip())


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
