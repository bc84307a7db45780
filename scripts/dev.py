"""The developer's commands behind `./qit test|check|fix`; run by the Python of .venv.

test [pytest arguments]   the tests; without arguments in several processes
check                     all that can be checked without running the program
fix                       what ruff can repair itself
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments
    if name == "test" and not {"-h", "--help"} & {*rest} and not browser():
        return 1
    commands = {"test": test, "check": check, "fix": fix}[name](rest)
    codes = [run(command) for command in commands]
    return next((code for code in codes if code), 0)


def test(arguments: Sequence[str]) -> list[list[str]]:
    """All of them in several processes, a file in one of them; in their order, because the browser
    of the page's tests, which come last, keeps its process's event loop."""
    spread = ("--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile")
    return [python("pytest", *(arguments or (*spread, "--no-loadscope-reorder")))]


def browser() -> bool:
    """Whether the tests of the page have one; as root on Debian it is installed. Playwright's own
    browsers are not used: they come from a host that many networks do not reach."""
    if find_browser():
        return True
    if shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
    if not find_browser():
        print("The tests of the page need Chromium or Chrome: install it (Debian, Ubuntu:")
        print("`sudo apt install chromium`), or name one in QIT_TEST_BROWSER.")
    return find_browser() is not None


def find_browser() -> str | None:
    named = os.environ.get("QIT_TEST_BROWSER", "")
    return next(filter(None, map(shutil.which, (named, *BROWSERS))), None)


def check(arguments: Sequence[str]) -> list[list[str]]:
    shell = ["qit", ".ci/run", "run_backend.sh"]
    docs = ROOT / "scripts" / "check_docs.py"
    return [
        python("ruff", "check", *arguments),
        python("ruff", "format", "--check"),
        python("mypy"),
        *([[found, *shell]] if (found := program("shellcheck")) else []),
        *([[sys.executable, str(docs.relative_to(ROOT))]] if docs.exists() else []),
        *([[found, "lock", "--check"]] if (found := program("uv")) else []),
    ]


def fix(arguments: Sequence[str]) -> list[list[str]]:
    return [python("ruff", "check", "--fix", *arguments), python("ruff", "format")]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def program(name: str) -> str | None:
    """A program of .venv, of PATH, or where the launcher looks for uv."""
    home = Path.home()
    folders = [Path(sys.executable).parent, home / ".local/bin", home / ".cargo/bin", ROOT / ".uv"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def run(command: Sequence[str]) -> int:
    shown = [Path(command[0]).name, *command[1:]]
    print(f"$ {shlex.join(shown)}", flush=True)
    # uv.lock is made for pypi.org: with another index in the environment uv would find it stale.
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_INDEX", "UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_EXTRA_INDEX"))
    }
    return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
