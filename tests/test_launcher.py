"""`./qit` with a uv that only writes down what it is asked: set-up, stamp and start."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import set_up

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = ("setup", "check", "fix")  # that the launchers' own help is printed for
OPTIONS = ("-h", "--help")
TOOLS = ("sh", "cat", "cmp", "dirname", "grep", "mkdir", "readlink", "rm")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="qit.cmd is the launcher there")

# `uv sync` makes a program that shows its arguments, and noise that must not reach stdout.
UV = r"""#!/bin/sh
case $1 in
    --version) echo 'uv 0.13.9'; exit ;;
    run) while [ "$1" != --script ]; do shift; done; shift; UV=$0 exec {python} "$@" ;;
    export) exit ;;
    venv) mkdir -p .venv/bin; exit ;;
esac
echo "$*" | tee -a uv.log "$HOME/uv.log" || true
[ "$1" != sync ] || [ ! -e fail ] || exit 1
[ "$1" != sync ] || sleep 0.3
mkdir -p .venv/bin
printf '#!/bin/sh\n# %s/.venv/\nprintf "<%%s>" "$@"\n' "$PWD" > .venv/bin/qit
printf '#!/bin/sh\n[ "$1" = -c ] && echo 2.13.0+cpu || printf "<%%s>" "$@"\n' > .venv/bin/python
chmod +x .venv/bin/qit .venv/bin/python
"""


@dataclass
class Project:
    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "qit", *arguments],
            env=self.environ | environ,
            cwd=self.root.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        with self.start(*arguments, **environ) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    def syncs(self) -> list[str]:
        log = self.root / "uv.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith("sync")]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "a folder 中文"
    (root / "scripts").mkdir(parents=True)
    for name in ("qit", "scripts/set_up.py", "scripts/install_torch.py", "scripts/help.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "uv.lock").write_text("locked\n")
    (root / "pyproject.toml").write_text('version = "1"\n')
    uv = tmp_path / "uv"
    uv.write_text(UV.replace("{python}", sys.executable))
    uv.chmod(0o755)
    return Project(
        root, {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UV": str(uv), "LC_ALL": "C.UTF-8"}
    )


def test_the_first_run_sets_up_and_the_second_only_starts(project: Project) -> None:
    code, out, err = project.run("generate", "a red circle")
    assert (code, out) == (0, "<generate><a red circle>")
    assert "installing the packages" in err
    assert project.run("plan", UV="/nonexistent") == (0, "<plan>", "")
    assert len(project.syncs()) == 1
    assert "--frozen --inexact --compile-bytecode" in project.syncs()[0]
    assert "--no-dev" in project.syncs()[0]


def test_arguments_reach_the_program_unchanged(project: Project) -> None:
    project.run()
    words = ("a  b", 'say "hello"', "it's", "$HOME *", "红色的圆", "", "--json", "back\\slash")
    assert project.run(*words)[1] == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize("name", ["uv.lock", "pyproject.toml", "scripts/install_torch.py"])
def test_a_change_sets_up_again(project: Project, name: str) -> None:
    project.run()
    with (project.root / name).open("a") as file:
        file.write("\n")
    project.run()
    project.run()
    assert len(project.syncs()) == 2


def test_a_moved_folder_sets_up_again(project: Project) -> None:
    project.run()
    project.root = project.root.rename(project.root.with_name("moved"))
    assert project.run("plan")[:2] == (0, "<plan>")
    assert len(project.syncs()) == 2


def test_a_failed_set_up_leaves_no_stamp(project: Project) -> None:
    project.run()
    (project.root / "uv.lock").write_text("other\n")
    (project.root / "fail").touch()
    code, out, err = project.run("plan")
    assert (code, out) == (1, "")
    assert "could not be installed" in err
    assert not (project.root / ".venv" / "ready").exists()
    (project.root / "fail").unlink()
    assert project.run("plan")[:2] == (0, "<plan>")


def test_two_starts_at_once_set_up_once(project: Project) -> None:
    starts = [project.start("plan"), project.start("plan")]
    assert [start.communicate()[0] for start in starts] == ["<plan>", "<plan>"]
    assert len(project.syncs()) == 1


def test_developers_commands_bring_their_own_packages(project: Project) -> None:
    project.run()
    code, out, _ = project.run("test", "-k", "a b")
    assert (code, out) == (0, f"<{project.root}/scripts/dev.py><test><-k><a b>")
    assert "--group dev" in project.syncs()[1]
    project.run("check")
    project.run("plan")
    assert len(project.syncs()) == 2


def test_a_named_backend_sets_up_once(project: Project) -> None:
    project.run(QIT_TORCH_BACKEND="cpu")
    project.run(QIT_TORCH_BACKEND="cpu")
    project.run()
    assert len(project.syncs()) == 1
    project.run(QIT_TORCH_BACKEND="cu130")
    assert len(project.syncs()) == 2


def test_setup_always_sets_up_and_starts_nothing(project: Project) -> None:
    project.run()
    assert project.run("setup")[:2] == (0, "")
    assert len(project.syncs()) == 2


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_help_is_printed_and_nothing_else_done(project: Project, command: str, option: str) -> None:
    code, out, err = project.run(command, option, UV="/nonexistent")
    assert (code, err) == (0, "")
    assert out == (REPOSITORY / "scripts" / "help.txt").read_text()
    assert f"./qit {command} " in out
    assert not project.syncs()


def test_the_launchers_print_the_same_help_for_the_same_words() -> None:
    ours, windows = ((REPOSITORY / name).read_text() for name in ("qit", "qit.cmd"))
    asked = re.findall(r"'(\w+) (--?\w+)'", ours)
    assert asked == [(command, option) for command in COMMANDS for option in OPTIONS]
    assert f"for %%c in ({' '.join(COMMANDS)}) do" in windows
    assert f"for %%h in ({' '.join(OPTIONS)}) do" in windows
    assert "scripts/help.txt" in ours
    assert "scripts\\help.txt" in windows


def test_a_mirror_of_pip_is_used(project: Project) -> None:
    project.run(PIP_INDEX_URL="https://mirror.example/simple")
    log = (project.root.parent / "uv.log").read_text()
    assert "pip install --no-deps" in log
    assert "--requirement" in log
    assert "sync" in log


@pytest.mark.parametrize("uv", ["", "old-uv"])
def test_without_a_good_uv_and_python_it_says_what_to_do(project: Project, uv: str) -> None:
    tools = project.root.parent / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "old-uv").write_text("#!/bin/sh\necho 'uv 0.8.22'\n")
    (tools / "old-uv").chmod(0o755)
    code, out, err = project.run("plan", PATH=str(tools), UV=uv)
    assert (code, out) == (1, "")
    assert "could not install uv" in err
    assert "https://docs.astral.sh/uv" in err
    assert not list((project.root / ".uv").glob("new.*"))


def test_the_launchers_watch_what_the_set_up_stamps() -> None:
    for name in ("qit", "qit.cmd"):
        text = (REPOSITORY / name).read_text().replace("\\", "/")
        assert f" {' '.join(set_up.SOURCES)}" in text.replace("(", " ")


def test_pips_settings_become_uvs(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\nfind-links =\n  /a\n  /b\n"
        "[install]\nextra-index-url = https://two.example https://three.example\n"
    )
    environ = {"PIP_INDEX_URL": "https://mine.example", "SSL_CERT_FILE": "/mine", "PIP_CERT": "/x"}
    found = set_up.uv_environment(environ, [config])
    assert found["UV_DEFAULT_INDEX"] == "https://mine.example"
    assert found["UV_FIND_LINKS"] == "/a,/b"
    assert found["UV_INDEX"] == "https://two.example https://three.example"
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert found["SSL_CERT_FILE"] == "/mine"


def test_uvs_own_settings_win() -> None:
    environ = {"UV_INDEX_URL": "https://uv.example", "PIP_INDEX_URL": "https://pip.example"}
    found = set_up.uv_environment({**environ, "VIRTUAL_ENV": "/other", "PYTHONPATH": "/x"}, [])
    assert "UV_DEFAULT_INDEX" not in found
    assert "VIRTUAL_ENV" not in found
    assert "PYTHONPATH" not in found
