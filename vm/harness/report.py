"""Tables and plots of the shared-file benchmark, from nothing but its JSON."""

import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from .plot import plot

PUBLISHED = {"4": 148.0, "8": 206.8, "16": 695.8, "32": 608.0}
# A patched row, and the row that it is a gain over.
PAIRS = {"5.10 patched": "5.10 unpatched", "6.1 patched": "6.1, flag never set", "6.1 stock": "6.1, flag never set"}
REAL = """O_DIRECT in the guest and on the host. One guest (6.1 patched) with a mount for each back end. The disk is a loop device over a file in memory: at once, where the CPUs are what limits, or with 2 ms for each read and write, where the storage does. Jobs that grow files end when they have written all; those that overwrite go on until the time is over."""
CACHED = """Files of 256 MiB together that the guest overwrites with O_DIRECT, and that the host has in its page cache. One guest (6.1 patched) with a mount for each back end, on a loop device over a file in memory."""
SLOW, FAST = "null store, 2 ms", "null store"
SHARED, EACH = "shared file", "file per job"


# The content of shared-file.json.
Results = dict[str, Any]
# Number of jobs to the MiB/s of each run, or to a figure made of them.
Runs = dict[str, list[float]]
Points = dict[str, float]
# Shared file or file per job to its runs; row name to these.
Kinds = dict[str, Runs]
Rows = dict[str, Kinds]


def all_rates(results: Results) -> Iterator[float]:
    """Every figure that was measured."""
    for part in ("null", "real", "cached"):
        for rows in rates(results, part).values():
            for kinds in rows.values():
                for points in kinds.values():
                    for values in points.values():
                        yield from values


def rates(results: Results, part: str) -> dict[str, Rows]:
    """Store or place to row to kind to jobs to MiB/s."""
    return results.get(part, {}).get("rates", {})


def write(folder: pathlib.Path) -> None:
    """Writes the documents of a JSON file beside it."""
    results = json.loads((folder / "shared-file.json").read_text())
    for name, text in render(results).items():
        (folder / name).write_text(text)


def render(results: Results) -> dict[str, str]:
    """File name to text of each document that the results make."""
    files = {"shared-file.md": markdown(results)}
    slow = rates(results, "null").get(SLOW)
    if slow:
        files["shared-file.svg"] = bandwidth_plot(slow)
        files["shared-file-gain.svg"] = gain_plot(slow)
    return files


def medians(kinds: Kinds, kind: str) -> Points:
    """Jobs to the median MiB/s."""
    return {jobs: statistics.median(values) for jobs, values in kinds.get(kind, {}).items()}


def over(ours: Runs, others: Runs) -> Points:
    """Jobs to the median of the rounds' ratios: the machine's speed may drift from round to round."""
    return {jobs: statistics.median(a / b for a, b in zip(ours[jobs], others[jobs])) for jobs in ours if jobs in others}


def ratios(kinds: Kinds) -> Points:
    """Jobs to shared file over file per job."""
    return over(kinds.get(SHARED, {}), kinds.get(EACH, {}))


def gains(rows: Rows, name: str) -> Points:
    """Jobs to per cent more than the row without the feature, for the shared file."""
    if name not in rows or PAIRS[name] not in rows:
        return {}
    found = over(rows[name].get(SHARED, {}), rows[PAIRS[name]].get(SHARED, {}))
    return {jobs: 100 * (ratio - 1) for jobs, ratio in found.items()}


def beyond_one_job(found: Points) -> Points:
    """Gains beyond that of a single job, whose causes are others than parallel writers."""
    one = found.get("1")
    return {} if one is None else {number: 100 * ((100 + gain) / (100 + one) - 1) for number, gain in found.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def markdown(results: Results) -> str:
    parts = [
        """# One shared file against a file per job

Made of `shared-file.json`, as `vm/bench/shared-file` writes it. MiB/s of 1 MiB writes in guests without hardware virtualization (TCG); ratios are what counts here. A ratio is the median of those of the rounds, since the machine's speed drifts."""
    ]
    if "null" in results:
        parts.append(how(results, "null"))
    for store, rows in rates(results, "null").items():
        what = (
            "The null store takes 2 ms for each write: what limits is how many are in flight at once, as with remote "
            "storage, until the CPUs do."
            if store == SLOW
            else "The null store takes no time: what limits is the CPUs that guest and daemon share."
        )
        parts += [f"## {store[0].upper()}{store[1:]}", what, rate_table(rows), ratio_table(rows), gain_table(rows)]
    if "real" in results:
        parts += ["## Real data", how(results, "real"), REAL]
    for place, rows in rates(results, "real").items():
        parts += [f"### {place}", rate_table(rows), peer_table(rows)]
    if "cached" in results:
        parts += ["## In the host's page cache", how(results, "cached"), CACHED]
    for place, rows in rates(results, "cached").items():
        parts += [f"### {place}", rate_table(rows), ratio_table(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def how(results: Results, part: str) -> str:
    """When and how a part was measured."""
    run = results[part]
    return (
        f"Measured on {run['date']} on {run['cpus']} CPUs by `vm/bench/shared-file --part {part} --runtime "
        f"{run['runtime']:g} --repeat {run['repeat']}`: {run['runtime']:g} s a point, each point the median of "
        f"{run['repeat']}, rows in turns. Guest kernels: {', '.join(run['kernels'])}."
    )


def job_numbers(rows: Rows) -> list[str]:
    return sorted({jobs for kinds in rows.values() for points in kinds.values() for jobs in points}, key=int)


def rate_table(rows: Rows) -> str:
    jobs = job_numbers(rows)
    lines = []
    for name, kinds in rows.items():
        for kind in (SHARED, EACH):
            found = medians(kinds, kind)
            lines.append([name, kind, *(f"{found[number]:.0f}" if number in found else "" for number in jobs)])
    return table(["MiB/s", "jobs:", *jobs], lines)


def ratio_table(rows: Rows) -> str:
    jobs = job_numbers(rows)
    lines = []
    for name, kinds in rows.items():
        found = ratios(kinds)
        many = [ratio for number, ratio in found.items() if int(number) > 1]
        lines.append(
            [
                name,
                *(f"{found[number]:.2f}" if number in found else "" for number in jobs),
                f"{geometric_mean(many):.2f}",
                f"{min(many, default=math.nan):.2f}",
            ]
        )
    return "Shared file over file per job (geometric mean and least over 2 jobs and more):\n\n" + table(
        ["", *jobs, "mean", "least"], lines
    )


def gain_table(rows: Rows) -> str:
    jobs = job_numbers(rows)
    lines = []
    for name, base in PAIRS.items():
        found = gains(rows, name)
        for what, values in ((f"{name} over {base}", found), ("… without what one job gains", beyond_one_job(found))):
            if values:
                lines.append([what, *(f"{values[number]:+.0f} %" if number in values else "" for number in jobs)])
    if not lines:
        return ""
    lines.append(["published", *(f"{PUBLISHED[number]:+.1f} %" if number in PUBLISHED else "" for number in jobs)])
    return "Gain for the shared file:\n\n" + table(["", *jobs], lines)


def peer_table(rows: Rows) -> str:
    jobs = job_numbers(rows)
    lines = []
    for kind in (SHARED, EACH):
        ours = rows.get("lanefsd", {}).get(kind, {})
        others = [over(ours, kinds[kind]) for name, kinds in rows.items() if name != "lanefsd" and kind in kinds]
        # Over the best of them is the least.
        least = {number: min((other[number] for other in others if number in other), default=None) for number in jobs}
        lines.append([kind, *(f"{least[number]:.2f}" if least[number] is not None else "" for number in jobs)])
    return "lanefsd over the best of virtiofsd's four settings:\n\n" + table(["", *jobs], lines)


def bandwidth_plot(rows: Rows) -> str:
    series = {}
    for name in ("5.10 unpatched", "5.10 patched", "6.1 patched"):
        for kind, dashed in ((SHARED, False), (EACH, True)):
            points = medians(rows.get(name, {}), kind)
            if points:
                series[f"{name}, {kind}"] = (sorted((int(x), y) for x, y in points.items()), dashed)
    return plot("Null store with 2 ms latency: MiB/s over jobs", series)


def gain_plot(rows: Rows) -> str:
    series = {}
    for name, base in list(PAIRS.items())[:2]:
        points = gains(rows, name)
        if points:
            series[f"{name} over {base}"] = (sorted((int(x), y) for x, y in points.items()), False)
    series["published"] = (sorted((int(x), y) for x, y in PUBLISHED.items()), True)
    return plot("One shared file, null store with 2 ms latency: gain in % over jobs", series)
