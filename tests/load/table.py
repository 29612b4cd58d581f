"""From single runs to medians, ratios and a page in Markdown."""

import json
from collections.abc import Mapping
from statistics import median
from typing import Any, TypedDict

from shared import Facts, Report


class Row(TypedDict):
    """A row: where it runs, the words for the load generator, and what it should reach."""

    name: str
    title: str
    share: str
    work: str
    # Runs per round, for rows whose single runs differ a lot.
    repeat: int
    targets: Mapping[str, float]


# Row name to column to its runs.
Reports = dict[str, dict[str, list[Report]]]
# Medians of the runs of a column; None for what it does not measure.
Column = dict[str, Any]
# What is compared, the ratio, the target, and whether a higher ratio is better.
Check = dict[str, Any]
# A row's title, columns and checks.
Entry = dict[str, Any]

INTRODUCTION = """\
# The engine against its peer

Written by `tests/load/compare`; every figure is the median of its runs. `loadgen` plays the guest with no
VM (one thread per queue, prepared requests, EVENT_IDX), so generator and daemon share the machine's
CPUs. *Limit* is the same work as plain system calls, with as many threads as operations in flight; it
shares its CPUs with no generator. *Peer* is {peer}, the fastest of its pools (0 is serial), started
like lanefsd with `--sandbox=none --cache=auto`, and `--inode-file-handles=never`. Rows with O_DIRECT
give both `--allow-direct-io`; ext4 and XFS lie on loop devices over files in memory, so they show
the cost of system calls and waking, not of a disk. Where other programs compete for the CPUs, a column
with many threads gets a larger share of them; CPU time per operation suffers less from that than
operations per second.

{date}, commit {commit}{dirty}, Linux {kernel}, {cpus} CPUs ({model}); {rounds} rounds of {seconds} s in turns.
"""


def column_medians(runs: list[Report]) -> Column:
    """Medians of the runs of one column."""

    def of(*path: str) -> Any:
        values = []
        for run in runs:
            value: Any = run
            for key in path:
                value = value[key]
            if value is not None:
                values.append(value)
        return median(values) if values else None

    return {
        "rate": of("operations_per_second"),
        "p50": of("latency_us", "p50"),
        "p99": of("latency_us", "p99"),
        "p999": of("latency_us", "p999"),
        "cpu": of("cpu_us_per_operation", "total"),
        "user": of("cpu_us_per_operation", "user"),
        "system": of("cpu_us_per_operation", "system"),
        "voluntary": of("switches_per_operation", "voluntary"),
        "involuntary": of("switches_per_operation", "involuntary"),
        "notifications": of("notifications_per_operation"),
        "system_calls": of("system_calls_per_operation"),
        "generator": of("generator_cpu_us_per_operation"),
        "others": of("foreign_cpus"),
        "lowest": min(run["operations_per_second"] for run in runs),
        "highest": max(run["operations_per_second"] for run in runs),
    }


def results(rows: list[Row], reports: Reports, cpu_target: float) -> list[Entry]:
    """One entry per row: medians per column, and what the targets say."""
    found: list[Entry] = []
    for row in rows:
        columns = {name: column_medians(runs) for name, runs in reports[row["name"]].items() if runs}
        peers = [name for name in columns if name.startswith("virtiofsd")]
        best = max(peers, key=lambda name: columns[name]["rate"], default=None)
        if "latency" in row["targets"] and "virtiofsd-0" in columns:
            best = "virtiofsd-0"
        entry: Entry = {
            "name": row["name"],
            "title": row["title"],
            "options": row["work"],
            "columns": columns,
            "peer": best,
        }
        entry["checks"] = checks(row, columns, best, found, cpu_target) if "lanefsd" in columns else []
        found.append(entry)
    return found


def compared(what: str, ratio: float, target: float | None, higher: bool) -> Check:
    """What is compared, the ratio, the target, and whether a higher ratio is better."""
    met = None if target is None else (ratio >= target if higher else ratio <= target)
    return {"what": what, "ratio": ratio, "target": target, "higher": higher, "met": met}


def with_peer(row: Row, ours: Column, peer: Column, cpu_target: float) -> list[Check]:
    """Comparisons with the best peer."""
    targets = row["targets"]
    found = [compared("rate", ours["rate"] / peer["rate"], targets.get("rate"), True)]
    if "latency" in targets:
        found.append(compared("p50", ours["p50"] / peer["p50"], targets["latency"], False))
        found.append(compared("p99", ours["p99"] / peer["p99"], targets["latency"], False))
    found.append(compared("CPU", ours["cpu"] / peer["cpu"], cpu_target, False))
    return found


def with_limit(row: Row, ours: Column, limit: Column) -> list[Check]:
    """Comparisons with plain system calls."""
    rate = compared("limit", ours["rate"] / limit["rate"], row["targets"].get("limit"), True)
    if cpus(limit) < cpus(ours):
        # Busy threads that got less of the CPUs than a daemon are no limit of anything.
        rate["met"] = None
    return [compared("limit CPU", ours["cpu"] / limit["cpu"], None, False), rate]


def checks(
    row: Row, columns: dict[str, Column], best: str | None, earlier: list[Entry], cpu_target: float
) -> list[Check]:
    """All comparisons of a row."""
    ours, targets = columns["lanefsd"], row["targets"]
    found: list[Check] = []
    if best:
        found += with_peer(row, ours, columns[best], cpu_target)
    if "limit" in columns:
        found += with_limit(row, ours, columns["limit"])
    for what in ("unmapped", "files"):
        if other := columns.get(f"lanefsd-{what}"):
            found.append(compared(what, ours["rate"] / other["rate"], targets.get(what), True))
            found.append(compared(f"{what} CPU", ours["cpu"] / other["cpu"], None, False))
    before = {entry["name"]: entry["columns"]["lanefsd"] for entry in earlier if "lanefsd" in entry["columns"]}
    if row["name"].startswith("queues") and (one := before.get(row["name"].replace("-4", "-1"))):
        found.append(compared("queues", ours["rate"] / one["rate"], targets.get("queues"), True))
    if "root" in targets and (root := before.get(row["name"].removesuffix("-user"))):
        found.append(compared("root CPU", ours["cpu"] / root["cpu"], targets["root"], False))
    return found


def cpus(column: Column) -> float:
    """CPUs that a column kept busy."""
    return column["rate"] * column["cpu"] / 1e6


def rounded(value: Any) -> Any:
    """Without the digits that say nothing."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items() if key not in ("work", "notes")}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def data(found: list[Entry], facts: Facts, reports: Reports, started: dict[str, list[float]] | None) -> str:
    """Everything as JSON, a run per line."""
    runs = [
        f' "{row}": {{\n'
        + ",\n".join(
            f'  "{column}": [\n   ' + ",\n   ".join(json.dumps(rounded(run)) for run in column_runs) + "]"
            for column, column_runs in columns.items()
        )
        + "}"
        for row, columns in reports.items()
    ]
    head = f'"machine": {json.dumps(facts)},\n"results": {json.dumps(rounded(found), indent=1)},\n'
    head += f'"start_milliseconds": {json.dumps(rounded(started))},\n'
    return "{" + head + '"runs": {\n' + ",\n".join(runs) + "}}\n"


def number(value: Any, digits: int = 1) -> str:
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def verdict(checks: list[Check], what: str) -> str:
    for check in checks:
        if check["what"] == what:
            text = f"{check['ratio']:.2f}"
            if check["target"] is not None:
                sign = "≥" if check["higher"] else "≤"
                outcome = {True: "met", False: "**missed**", None: "cannot be said"}[check["met"]]
                text += f" ({sign} {check['target']:g} {outcome})"
            return text
    return "–"


def page(found: list[Entry], facts: Facts) -> str:
    """The page."""
    dirty = " with changes" if facts["changes"] else ""
    lines = [INTRODUCTION.format(dirty=dirty, **facts), "## Ratios", ""]
    lines.append(
        "| row | limit op/s | lanefsd op/s | peer op/s (pool) | against peer | against limit"
        " | p50, p99 against peer | CPU per operation against peer | and against limit |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for entry in found:
        columns, checks = entry["columns"], entry["checks"]
        rate = {name: number(column["rate"], 0) for name, column in columns.items()}
        best = entry["peer"]
        peer = f"{rate[best]} ({best.removeprefix('virtiofsd-')})" if best else "–"
        against_peer = verdict(checks, "rate")
        if best is None and verdict(checks, "queues") != "–":
            against_peer = "row before: " + verdict(checks, "queues")
        cpu = verdict(checks, "CPU")
        if verdict(checks, "root CPU") != "–":
            cpu += "; against root's requests: " + verdict(checks, "root CPU")
        if verdict(checks, "unmapped") != "–":
            against_peer += f"; not mapped: {verdict(checks, 'unmapped')}; 16 files: {verdict(checks, 'files')}"
            cpu += f"; not mapped: {verdict(checks, 'unmapped CPU')}; 16 files: {verdict(checks, 'files CPU')}"
        latency = ", ".join(text for text in (verdict(checks, "p50"), verdict(checks, "p99")) if text != "–")
        lines.append(
            f"| {entry['title']} | {rate.get('limit', '–')} | {rate.get('lanefsd', '–')} | {peer}"
            f" | {against_peer} | {verdict(checks, 'limit')} | {latency or '–'}"
            f" | {cpu} | {verdict(checks, 'limit CPU')} |"
        )
    targets = [check for entry in found for check in entry["checks"] if check["target"] is not None]
    unclear = sum(1 for check in targets if check["met"] is None)
    met = sum(1 for check in targets if check["met"])
    others = [column["others"] for entry in found for column in entry["columns"].values()]
    lines += [
        "",
        f"{met} of {len(targets)} targets are met, and of {unclear} it cannot be said, since other work took more"
        " CPU time from the limit's threads than from the daemon. While it ran, other work (loop devices of the"
        f" O_DIRECT rows included) kept {median(others):.2f} CPUs busy in the median, {max(others):.2f}"
        " at most. *Lowest* and *highest* below show how far the runs of one column lay apart."
        " [notes.md](notes.md) says why targets are missed.",
        "",
        "",
    ]
    return "\n".join(lines) + details(found)


def details(found: list[Entry]) -> str:
    lines = [
        "## All columns",
        "",
        "Latency and CPU time in µs per operation; context switches of the daemon as voluntary/others.",
        "",
    ]
    lines.append(
        "| row | column | op/s | lowest | highest | p50 | p99 | p99.9 | CPU (user + system)"
        " | switches | notifications | system calls | generator CPU | others' CPUs |"
    )
    lines.append("|---" * 14 + "|")
    for entry in found:
        for name, column in entry["columns"].items():
            cells = [
                entry["name"],
                name,
                number(column["rate"], 0),
                number(column["lowest"], 0),
                number(column["highest"], 0),
                number(column["p50"]),
                number(column["p99"]),
                number(column["p999"]),
                f"{number(column['cpu'], 2)} ({number(column['user'], 2)} + {number(column['system'], 2)})",
                f"{number(column['voluntary'], 2)}/{number(column['involuntary'], 2)}",
                number(column["notifications"], 2),
                number(column["system_calls"], 2),
                number(column["generator"], 2),
                number(column["others"], 2),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
