"""Figures of compare.py as text: a line while it runs, and a Markdown table of one or more of its JSON files.

python bench/table.py RUN.json [RUN.json ...]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

HEADS = ["model", "work", "threads", "llmq", "llama.cpp", "ratio", "notes"]
CACHED = 2**28  # smaller files may come from the processor's caches, and not from memory
DOUBTFUL = 0.05  # other processes' share of the processors


def speeds(task: dict[str, Any], engine: str) -> list[float]:
    return [answer["speed"] for answer in task["rounds"].get(engine, [])]


def work(task: dict[str, Any]) -> str:
    what = {"prefill": "prefill of {n}", "decode": "decode", "batch": "{n} at once"}[task["kind"]].format(**task)
    return what + (f" at {task['depth']}" if task["depth"] >= 256 else "")


def share(report: dict[str, Any], task: dict[str, Any], engine: str) -> float:
    """Bytes of weights, keys and values that decoding reads in a second, as a share of the streaming read."""
    seen = task["depth"] + task["n"] / 2
    token = report["token_bytes"] + report["kv_bytes_per_position"] * seen
    read = task["rounds"]["read"]
    return statistics.median(s * token / r for s, r in zip(speeds(task, engine), read, strict=True))


def notes(report: dict[str, Any], task: dict[str, Any]) -> str:
    """Shares of the streaming read, or the time against that of one token; and what makes a figure doubtful."""
    engines = [engine for engine in ("llmq", "llama.cpp") if speeds(task, engine)]
    found = []
    if task["kind"] == "decode" and report["bytes"] > CACHED:
        shares = " and ".join(f"{share(report, task, engine):.0%}" for engine in engines)
        found.append(f"{shares} of the streaming read")
    if task["kind"] == "batch":
        times = (statistics.median(answer["of_one"] for answer in task["rounds"][engine]) for engine in engines)
        found.append(" and ".join(f"{x:.2f}" for x in times) + " times one token")
    if report["isa"]:
        found.append(f"{report['isa']} only")
    if settings := report["engines"].get("llama.cpp", {}).get("settings"):
        found.append(f"llama.cpp {' '.join(settings)}")
    elsewhere = max(task["rounds"]["elsewhere"])
    if elsewhere > DOUBTFUL:
        found.append(f"up to {elsewhere:.0%} of the processors taken by others")
    return ", ".join(found)


def ratio(task: dict[str, Any]) -> str:
    """The median of the rounds' ratios, and the smallest and largest."""
    both = zip(speeds(task, "llmq"), speeds(task, "llama.cpp"), strict=False)
    found = [ours / theirs for ours, theirs in both]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" if found else ""


def speed(task: dict[str, Any], engine: str) -> str:
    if not speeds(task, engine):
        return ""
    found = statistics.median(speeds(task, engine))
    return f"{found:,.0f}" if found >= 1000 else f"{found:.3g}"


def cells(report: dict[str, Any], task: dict[str, Any]) -> list[str]:
    engines = [speed(task, engine) for engine in ("llmq", "llama.cpp")]
    return [report["file"], work(task), str(task["threads"]), *engines, ratio(task), notes(report, task)]


def line(report: dict[str, Any], task: dict[str, Any]) -> str:
    read = statistics.median(task["rounds"]["read"]) / 1e9
    pairs = zip(HEADS, cells(report, task), strict=True)
    return "  ".join(f"{head} {cell}" for head, cell in pairs if cell) + f"  read {read:.1f} GB/s"


def heading(report: dict[str, Any]) -> str:
    """Where and with what the figures were made."""
    ours, theirs = (report["engines"].get(engine, {}) for engine in ("llmq", "llama.cpp"))
    found = [f"{report['machine']}, {report['cores']} cores ({ours.get('isa', '')})", report["date"]]
    if ours:
        found.append(f"llmq {ours['llmq']} at {report['commit']}, numba {ours['numba']}")
    if theirs:
        found.append(
            f"llama.cpp {theirs['llama.cpp']} (ggml {theirs['ggml']} {theirs['commit']}, "
            f"llama-cpp-python {theirs['llama-cpp-python']})"
        )
    return "; ".join(found)


def main() -> None:
    reports = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    rows = [HEADS, ["---"] * len(HEADS)]
    rows += [cells(report, task) for report in reports for task in report["tasks"]]
    lines = [*dict.fromkeys(map(heading, reports)), "", *("| " + " | ".join(row) + " |" for row in rows)]
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
