"""From samples to `results.json`, `RESULTS.md` and `results.svg`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from contenders import BARE, OLD, OURS

Document = dict[str, Any]

# How a figure is written: heading, factor, decimals.
_METRICS = {
    "wall": ("wall s", 1.0, 3),
    "again": ("again s", 1.0, 3),
    "cpu": ("CPU s", 1.0, 3),
    "cpu_each": ("CPU µs each", 1e6, 0),
    "rate": ("per second", 1.0, 0),
    "cold": ("first call ms", 1000.0, 2),
    "miss": ("miss ms", 1000.0, 2),
    "hit": ("hit ms", 1000.0, 2),
    "peak_kib": ("peak MiB", 1 / 1024, 1),
}
_BATCH = OURS + ", batch"
_MAP = OURS + ", own 16 threads"


class Target(NamedTuple):
    """A figure to reach: a ratio in which more is better, or a bound in which less is."""

    what: str
    goal: float
    measure: Callable[[Document], float]
    ratio: bool = True


def _values(document: Document, scenario: str, name: str, metric: str) -> list[float]:
    samples = document["scenarios"][scenario]["samples"][name]
    values = [s[metric] for s in samples if isinstance(s.get(metric), (int, float))]
    if not values:
        raise LookupError(f"{name} has no {metric} in {scenario}")
    return values


def median(document: Document, scenario: str, name: str, metric: str) -> float:
    """Return the median of a figure; LookupError where there is none."""
    return statistics.median(_values(document, scenario, name, metric))


def _faster(
    scenario: str, *rivals: str, who: str = OURS, metric: str = "wall"
) -> Callable[[Document], float]:
    """How many times faster than the fastest of the rivals (all others, if none is named)."""

    def ratio(document: Document) -> float:
        names = rivals or tuple(
            n for n in document["scenarios"][scenario]["samples"] if not n.startswith(OURS)
        )
        found = []
        for name in names:
            try:
                found.append(median(document, scenario, name, metric))
            except LookupError:
                continue
        if not found:
            raise LookupError(f"no rival in {scenario}")
        return min(found) / median(document, scenario, who, metric)

    return ratio


def _rate(scenario: str, rival: str) -> Callable[[Document], float]:
    return lambda d: median(d, scenario, OURS, "rate") / median(d, scenario, rival, "rate")


def _no_loss(document: Document) -> float:
    return median(document, "hits16", OURS, "rate") / median(document, "hits", OURS, "rate")


def _memory(scenario: str) -> Callable[[Document], float]:
    def above_idle(document: Document) -> float:
        # The most it ever took, not the median: memory is a promise.
        peak = max(_values(document, scenario, OURS, "peak_kib"))
        return (peak - median(document, "process", "python", "peak_kib")) / 1024

    return above_idle


def _requests(step: str, who: str = OURS) -> Callable[[Document], float]:
    def count(document: Document) -> float:
        sample = document["scenarios"]["requests"]["samples"][who][0]
        asked = sample[step]
        return 0.0 if asked == "none" else float(len(asked.split(", ")))

    return count


def _second_call(document: Document) -> float:
    return median(document, "tree", OURS, "again") / median(document, "tree", OURS, "wall")


def _extra_round_trips(scenario: str) -> Callable[[Document], float]:
    def ratio(document: Document) -> float:
        return median(document, scenario, OURS, "hit") / median(document, scenario, BARE, "hit")

    return ratio


TARGETS = [
    Target("import: times faster than obstore", 1, _faster("import", "obstore")),
    Target("import: times faster than boto3", 12, _faster("import", "boto3")),
    Target("process reads a JSON: times faster than 0.1", 4, _faster("process", OLD)),
    Target(
        "process reads a JSON: memory, times less than 0.1",
        2,
        _faster("process", OLD, metric="peak_kib"),
    ),
    Target("requests of a miss", 1, _requests("on miss"), ratio=False),
    Target("requests of a hit", 1, _requests("on hit"), ratio=False),
    Target(
        "requests of a hit within `max_age`",
        0,
        _requests("on hit", OURS + ", max_age"),
        ratio=False,
    ),
    Target("hits per second: times 0.1", 5, _rate("hits", OLD)),
    Target("hits per second: share of bare http.client", 0.6, _rate("hits", BARE)),
    # Meant is 1; a tenth is what two rounds of the same differ by on a busy machine.
    Target("hits per second: 16 threads against one", 0.9, _no_loss),
    Target("hit at 20 ms: times a bare round trip", 1.1, _extra_round_trips("far"), ratio=False),
    Target(
        "small objects, batch: times faster than obstore",
        1,
        _faster("small", "obstore", who=_BATCH),
    ),
    Target(
        "small objects, batch: times faster than boto3",
        4,
        _faster("small", "boto3", who=_BATCH),
    ),
    Target("small objects, batch: times faster than 0.1", 15, _faster("small", OLD, who=_BATCH)),
    Target(
        "small objects, own threads: speed of obstore", 0.7, _faster("small", "obstore", who=_MAP)
    ),
    Target(
        "small objects, own threads: times faster than boto3",
        4,
        _faster("small", "boto3", who=_MAP),
    ),
    Target(
        "small objects, own threads: times faster than 0.1", 15, _faster("small", OLD, who=_MAP)
    ),
    Target("large object, http: times faster than the fastest peer", 1.3, _faster("http-large")),
    Target("large object, https: times faster than curl", 1, _faster("https-large", "curl")),
    Target(
        "large object, narrow connections: times faster than s5cmd and CRT",
        1,
        _faster("narrow", "s5cmd", "boto3 + CRT"),
    ),
    Target("large object, http: MiB above idle", 40, _memory("http-large"), ratio=False),
    Target("large object, https: MiB above idle", 40, _memory("https-large"), ratio=False),
    Target("medium object, http: MiB above idle", 40, _memory("http-medium"), ratio=False),
    Target("tree: times faster than s5cmd and obstore", 1, _faster("tree", "s5cmd", "obstore")),
    Target("tree: times faster than s3fs", 4, _faster("tree", "s3fs")),
    Target("tree, unchanged: share of the first call", 0.1, _second_call, ratio=False),
]


def targets_table(document: Document) -> str:
    """Each figure to reach, what was measured, and whether it was met."""
    rows = [["figure", "to reach", "measured", ""]]
    for target in TARGETS:
        sign = "≥" if target.ratio else "≤"
        try:
            value = target.measure(document)
        except (LookupError, ZeroDivisionError):
            continue
        met = value >= target.goal if target.ratio else value <= target.goal
        rows.append(
            [
                target.what,
                f"{sign} {target.goal:g}",
                f"{value:.2f}",
                "met" if met else "**not met**",
            ]
        )
    return _table(rows) if rows[1:] else "(no figure to reach was measured)"


def scenario_table(name: str, result: dict[str, Any]) -> str:
    """All contenders of one scenario: medians, with minimum and maximum of the first figure."""
    samples: dict[str, list[dict[str, Any]]] = result["samples"]
    metrics = [
        m for m in _METRICS if any(s.get(m) is not None for x in samples.values() for s in x)
    ]
    words = list(
        dict.fromkeys(k for x in samples.values() for s in x for k in s if k not in _METRICS)
    )
    words = [w for w in words if w != "error"]
    rows = [["contender", *(_METRICS[m][0] for m in metrics), *words]]
    for contender, taken in samples.items():
        rows.append([contender, *_cells(taken, metrics, words)])
    return f"### {result['title']} (`{name}`)\n\n" + _table(rows)


def _cells(taken: list[dict[str, Any]], metrics: list[str], words: list[str]) -> list[str]:
    errors = [s["error"] for s in taken if "error" in s]
    if errors:
        return ["failed: " + " ".join(errors[0].replace("|", "/").split())[:160]]
    cells = [
        _spread(metric, [s[metric] for s in taken if s.get(metric) is not None])
        for metric in metrics
    ]
    return cells + [str(taken[0].get(word, "")) if taken else "" for word in words]


def _spread(metric: str, values: list[float]) -> str:
    if not values:
        return ""
    _, factor, digits = _METRICS[metric]
    middle, low, high = (x * factor for x in (statistics.median(values), min(values), max(values)))
    if len(values) == 1 or metric in ("cpu", "cpu_each", "peak_kib"):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _table(rows: list[list[str]]) -> str:
    width = len(rows[0])
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * width)
    return "\n".join(lines) + "\n"


def write(document: Document, out: Path) -> None:
    """Write the three files."""
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "RESULTS.md").write_text(markdown(document), encoding="utf-8")
    try:
        draw(document, out / "results.svg")
    except ImportError:
        print("matplotlib is missing: no chart")


def markdown(document: Document) -> str:
    """The whole table of a run."""
    about = document["machine"]
    used = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts = [
        "# Results\n",
        "Written by `tests/bench/run.py`; do not edit. Its docstring says how it measures.\n",
        f"{about['date']} · {about['cpu']}, {about['cores']} cores, {about['memory']} · "
        f"{about['system']} · Python {about['python']} · {about['server']} · "
        f"files on {about['files']}\n",
        f"{used}, aind-s3-cache 0.1.0\n",
        "Medians, with minimum and maximum in brackets. CPU counts the client, not the server.\n",
        "## Figures to reach\n",
        targets_table(document),
        "## Scenarios\n",
    ]
    parts += [scenario_table(name, result) for name, result in document["scenarios"].items()]
    return "\n".join(parts)


# ---- The chart -----------------------------------------------------------------------------------

_INK = "#7d8590"  # legible on white and on black
_OURS, _PEER = "#e8590c", "#8b96a3"

# scenario, figure, title, unit, from a median to the length of its bar
_PANELS: list[tuple[str, str, str, Callable[[float], float]]] = [
    ("import", "wall", "{title} · ms, less is better", lambda x: x * 1000),
    ("process", "wall", "{title} · ms, less is better", lambda x: x * 1000),
    ("hits", "rate", "{title} · per second, more is better", lambda x: x),
    ("small", "wall", "{title} · s, less is better", lambda x: x),
    ("tree", "wall", "{title} · s, less is better", lambda x: x),
    ("http-large", "wall", "{title} · s, less is better", lambda x: x),
    ("https-large", "wall", "{title} · s, less is better", lambda x: x),
    ("narrow", "wall", "{title} · s, less is better", lambda x: x),
]


def draw(document: Document, path: Path) -> None:
    """Draw one panel of bars for each scenario, the best on top."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bench",
            "font.size": 8,
            "font.family": "sans-serif",
            "text.color": _INK,
        }
    )
    from matplotlib import pyplot

    panels = [panel for panel in _PANELS if panel[0] in document["scenarios"]]
    if not panels:
        return
    rows = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(rows, 2, figsize=(9, 2.0 * rows + 0.4), squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        _panel(axes, document, *panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout(w_pad=2.0, h_pad=1.6)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def _panel(
    axes: Any,
    document: Document,
    name: str,
    metric: str,
    title: str,
    scale: Callable[[float], float],
) -> None:
    scenario = document["scenarios"][name]
    bars = []
    for contender in scenario["samples"]:
        try:
            bars.append((scale(median(document, name, contender, metric)), contender))
        except LookupError:
            continue
    bars = [bar for bar in bars if bar[1] != "python"]
    bars.sort(reverse=metric != "rate")
    lengths, names = [b[0] for b in bars], [b[1] for b in bars]
    colors = [_OURS if n.startswith(OURS) else _PEER for n in names]
    axes.barh(range(len(bars)), lengths, color=colors, height=0.7)
    for i, length in enumerate(lengths):
        axes.text(length, i, f" {_short(length)}", va="center", fontsize=7, color=_INK)
    axes.set_yticks(range(len(bars)), names, fontsize=7, color=_INK)
    axes.set_title(title.format(title=scenario["title"]), fontsize=8, loc="left", color=_INK)
    axes.set_xlim(0, max(lengths, default=1) * 1.15)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
