"""How long daemons take from their start until a front end can connect."""

import json
import pathlib
import subprocess
from statistics import median

from shared import Word, log

STARTS_PER_ROUND = 10
COLUMNS = {
    "lanefsd": ["--log-level=warn"],
    "lanefsd, no sandbox": ["--log-level=warn", "--sandbox=none"],
    "virtiofsd": ["--log-level=error"],
    "virtiofsd, no sandbox": ["--log-level=error", "--sandbox=none"],
}


def measure(rounds: int, share: pathlib.Path, ours: pathlib.Path, peer: pathlib.Path) -> dict[str, list[float]]:
    """Starts all columns in turns; milliseconds of each start by column."""
    found: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for turn in range(rounds * STARTS_PER_ROUND):
        columns = list(COLUMNS)
        first = turn % len(columns)
        for column in columns[first:] + columns[:first]:
            program = peer if column.startswith("virtiofsd") else ours / "lanefsd"
            command: list[Word] = [ours / "loadgen", "start", "--backend", program, "--share", share]
            command += [f"--backend-arg={argument}" for argument in COLUMNS[column]]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            found[column].append(json.loads(done.stdout)["milliseconds"])
    for column, times in found.items():
        log.info(f"start  {column:<22} {median(times):6.2f} ms")
    return found


def page(found: dict[str, list[float]]) -> str:
    """A section of the page."""
    count = len(found["lanefsd"])
    lines = [
        "## Start to listening",
        "",
        f"Milliseconds from fork(2) until connect(2) succeeds, in {count} starts of each in turns. Both daemons"
        " with their defaults (a namespace sandbox and a filter of system calls), and without a sandbox.",
        "",
        "| column | median | lowest | highest |",
        "|---|---|---|---|",
    ]
    for column, times in found.items():
        lines.append(f"| {column} | {median(times):.2f} | {min(times):.2f} | {max(times):.2f} |")
    ratio = median(found["lanefsd"]) / median(found["virtiofsd"])
    outcome = "met" if ratio <= 1 else "**missed**"
    lines += ["", f"With defaults {ratio:.2f} of the peer's time (≤ 1 {outcome}).", ""]
    return "\n".join(lines)
