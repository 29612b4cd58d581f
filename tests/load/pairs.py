"""lanefsd of this tree beside lanefsd of another commit: pairs of runs, and the ratios of the pairs."""

import os
import pathlib
import subprocess
from collections.abc import Callable
from statistics import median, quantiles

from shared import ROOT, TARGET, Report, log, machine, run
from table import Row

# A report of each of the two.
Pair = dict[str, Report]
BEFORE, NOW = "before", "now"
# What may be lost against the other commit before a row is marked.
LEAST_RATE, MOST_CPU = 0.97, 1.03


def build_before(program_or_commit: str) -> pathlib.Path:
    """The daemon to compare with: a program, or a commit, which is built in a work tree of its own."""
    if os.path.isfile(program_or_commit):
        return pathlib.Path(program_or_commit).resolve()
    tree, target = TARGET / "before", TARGET / "before-build"
    log.info(f"building lanefsd of {program_or_commit}")
    if tree.exists():
        run(["git", "worktree", "remove", "--force", tree], cwd=ROOT)
    run(["git", "worktree", "add", "--detach", "--quiet", tree, program_or_commit], cwd=ROOT)
    try:
        run(
            ["cargo", "build", "--release", "--locked", "--bin", "lanefsd"],
            cwd=tree,
            env=dict(os.environ, CARGO_TARGET_DIR=str(target)),
        )
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    return target / "release/lanefsd"


def ratio(pairs: list[Pair], of: Callable[[Report], float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of all pairs: now over before."""
    ratios = [of(pair[NOW]) / of(pair[BEFORE]) for pair in pairs]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return median(ratios), low, high


def measure(
    rows: list[Row], rounds: int, measure_one: Callable[[str, Row], Report | None]
) -> tuple[dict[str, list[Pair]], int]:
    """Runs all rows in `rounds` pairs, first one and then the other first. `measure_one(column, row)` returns a
    report, or None for a run that failed. Returns the pairs of each row, and how many runs failed."""
    pairs: dict[str, list[Pair]] = {row["name"]: [] for row in rows}
    failed = 0
    for number in range(rounds):
        for row in rows:
            order = (BEFORE, NOW) if number % 2 == 0 else (NOW, BEFORE)
            reports = {column: measure_one(column, row) for column in order}
            pair = {column: report for column, report in reports.items() if report is not None}
            if len(pair) < len(order):
                failed += 1
                continue
            pairs[row["name"]].append(pair)
            log.info(
                f"round {number + 1}/{rounds}  {row['name']:<20} {rate(pair[BEFORE]):>11,.0f} ->"
                f" {rate(pair[NOW]):>11,.0f} op/s  {rate(pair[NOW]) / rate(pair[BEFORE]):.3f}"
            )
    return pairs, failed


def rate(report: Report) -> float:
    return report["operations_per_second"]


def cpu(report: Report) -> float:
    return report["cpu_us_per_operation"]["total"]


def page(rows: list[Row], pairs: dict[str, list[Pair]], rounds: int, seconds: float, against: str) -> str:
    """A table: ratios of this tree over the other commit."""
    facts = machine()
    lines = [
        f"lanefsd of {facts['commit']}{' with changes' if facts['changes'] else ''} beside that of {against}:"
        f" {rounds} pairs of {seconds} s, in turns; Linux {facts['kernel']}, {facts['cpus']} CPUs"
        f" ({facts['model']}). Median and quartiles of the pairs' ratios.",
        "",
        "| row | op/s before | op/s now | rate | CPU per operation |",
        "|---|---|---|---|---|",
    ]
    slower = 0
    for row in rows:
        of_row = pairs[row["name"]]
        if not of_row:
            continue
        cells = []
        for of, sign, limit in ((rate, -1, LEAST_RATE), (cpu, 1, MOST_CPU)):
            middle, low, high = ratio(of_row, of)
            is_worse = sign * middle > sign * limit
            slower += is_worse
            mark = " **worse**" if is_worse else ""
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f}){mark}")
        before, now = (median(rate(pair[column]) for pair in of_row) for column in (BEFORE, NOW))
        lines.append(f"| {row['title']} | {before:,.0f} | {now:,.0f} | {' | '.join(cells)} |")
    lines += ["", f"Figures worse than {LEAST_RATE} of the rate or {MOST_CPU} of the CPU time: {slower}."]
    return "\n".join(lines) + "\n"
