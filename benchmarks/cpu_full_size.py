"""The full-size 20B model on the CPU with less RAM than weights: seconds and peak memory.

    .venv/bin/python benchmarks/cpu_full_size.py FOLDER [--ram 8GiB] [--steps 2] [--json]
        [--docs FILE]

Makes the model of random weights in FOLDER if it is not there (57.7 GB), then runs two `qit
generate` at 256x256, each in a process of its own. The first shows how fast the disk is, and what
reading costs the CPU; reported is the second, of another prompt and another number of steps, with
the peak resident memory of both.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import full_size
from qwen_image_tool.app import library_versions
from qwen_image_tool.device import cores, cpu_name, memory
from sections import write_section

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()

    if not options.folder.exists():
        full_size.make(options.folder)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", "from qwen_image_tool.cli import main; main()"]
        command += ["generate", "--model", str(options.folder), "--json", "--size", "256x256"]
        command += ["--seed", "1", "--ram", options.ram, "--out", out]
        run([*command, "a blue square", "--steps", str(options.steps + 1)], out)
        started = time.perf_counter()
        result = run([*command, "a red circle", "--steps", str(options.steps)], out)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # kilobytes on Linux
    phases = {phase["phase"]: phase for phase in result["plan"]["phases"]}
    figures = {
        "machine": f"{cpu_name()}, {cores()} cores, {memory()[0] / GIB:.0f} GiB, "
        + platform.system(),
        "versions": library_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "ram_limit": options.ram,
        "steps": options.steps,
        "placement": result["plan"]["placement"],
        "predicted_ram_gib": round(max(each["ram_bytes"] for each in phases.values()) / GIB, 2),
        "peak_rss_gib": round(peak / GIB, 2),
        "seconds": round(seconds, 1),
        "phase_seconds": {name: round(took, 1) for name, took in result["seconds"].items()},
        "predicted_seconds": {name: round(each["seconds"], 1) for name, each in phases.items()},
    }
    print(json.dumps(figures, indent=None if options.json else 2))
    if options.docs:
        write_section(options.docs, "cpu full size", table(figures), add=True)


def run(command: list[str], home: str) -> dict[str, Any]:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env=os.environ | {"QIT_HOME": home}
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    placement, phases = figures["placement"], figures["phase_seconds"]
    stays = f"{placement['resident']} of {placement['blocks']} blocks stay in RAM"
    command = f"benchmarks/cpu_full_size.py FOLDER --ram {figures['ram_limit']}"
    predicted = figures["predicted_seconds"]
    columns = {
        **{name: f"{took} ({predicted.get(name, 0)})" for name, took in phases.items()},
        "all, seconds": figures["seconds"],
        "peak RAM GiB": figures["peak_rss_gib"],
        "predicted": figures["predicted_ram_gib"],
    }
    lines = [
        f"`{command}`, {figures['date']}: {figures['machine']}, {versions}.",
        f"Qwen-Image (20B) at 256x256, {figures['steps']} steps with CFG; {stays}. In brackets:",
        "predicted.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        f"| {' | '.join(str(value) for value in columns.values())} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
