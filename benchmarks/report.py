"""Results of benchmarks/gpu.py and benchmarks/micro.py as Markdown and as a plot (SVG). Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """A number of a cell, and what it should reach on one H200: to be shipped (`gate`), and to be content (`goal`)."""

    cell: str
    key: str  # dotted
    sign: str
    gate: float
    goal: float | None = None

    def met(self, value: float, bound: float) -> bool:
        return value >= bound if self.sign == ">=" else value <= bound


TARGETS = (
    Target("ours_2048", "tokens_per_s.median", ">=", 14000, 15400),
    Target("ours_4096", "tokens_per_s.median", ">=", 13500, 14500),
    Target("ours_8192", "tokens_per_s.median", ">=", 11500, 13100),
    Target("ours_2048", "mb_per_token", "<=", 3.5, 3.0),
    Target("cold_start", "seconds", "<=", 60, 25),
    Target("post_8b", "ours_against_peft_fp32_2048.forward", ">=", 1.55, 1.7),
    Target("post_8b", "ours_against_peft_fp32_2048.backward", ">=", 1.4, 1.6),
    Target("post_8b", "ours_against_peft_fp32_2048.backward_memory", "<=", -0.45, -0.55),
)
# Of single operations, at T = 16384, the Triton kernels: ms, and the share of the copy's rate (or of the plain product's) that is reached.
AT, ELEMENTWISE = 16384, ("rms_norm", "add_rms_norm", "rope", "glu")
MICRO_TARGETS = (
    Target("linear_logprob", f"ours triton.both.{AT}.ms", "<=", 52, 48),
    *(Target(cell, f"ours triton.{half}.{AT}.share", ">=", 0.8) for cell in ELEMENTWISE for half in ("forward", "backward")),
    Target("dropout", f"ours triton.forward.{AT}.share", ">=", 0.8),
)
# What the LoRA-kernels post says of its own against peft's default, on an H100: forward, backward; memory in either. Rows not stated.
PUBLISHED = {
    "post_135m": (1.48, 1.15, -0.382, -0.389),
    "post_1.7b": (1.46, 1.25, -0.346, -0.359),
    "post_8b": (1.48, 1.25, -0.257, -0.259),
}


def look_up(results: dict, cell: str, key: str) -> float | None:
    found = results["cells"].get(cell, {})
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def by_way(results: dict) -> dict:
    """The rows of benchmarks/micro.py for `look_up`, by way, half and T: ms, and the floor's share of the time."""
    cells = {}
    for name, found in results["cells"].items():
        for row in found.get("rows", ()):
            if "seconds" in row:
                at = cells.setdefault(name, {}).setdefault(row["way"], {}).setdefault(row["half"], {})
                at[str(row["tokens"])] = {
                    "ms": 1e3 * row["seconds"]["median"],
                    "share": 1 / row["of_floor"] if row["of_floor"] else None,
                }
    return {"cells": cells}


def judged(targets: Iterable[Target], results: dict) -> str:
    """The table of those that there are numbers for."""

    def verdict(t: Target, value: float, bound: float | None) -> list[str | None]:
        return [None, None] if bound is None else [f"{t.sign} {bound:g}", "met" if t.met(value, bound) else "missed"]

    found = [(t, look_up(results, t.cell, t.key)) for t in targets]
    body = [[f"{t.cell} {t.key}", value, *verdict(t, value, t.gate), *verdict(t, value, t.goal)] for t, value in found if value is not None]
    return rows(["target", "measured", "gate", "", "goal", ""], body)


def rows(head: Iterable[str], body: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers to the right."""
    head, body = list(head), [[shown(value) for value in row] for row in body]
    if not body:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(results: dict) -> str:
    """All tables of a file of results."""
    cells = results["cells"]
    parts = [head(results)]
    parts += [gpu_tables(results)] if results["suite"] == "gpu" else [micro_table(name, found) for name, found in cells.items()]
    if not results["tiny"]:
        parts.append(judged(TARGETS, results) if results["suite"] == "gpu" else judged(MICRO_TARGETS, by_way(results)))
    failed = [f"* `{name}` {word}: {found[word]}" for name, found in cells.items() for word in ("failed", "unavailable") if word in found]
    failed += [f"* `{name}` skipped, for the deadline" for name in results["skipped"]]
    return "\n".join(part for part in [*parts, "\n".join(failed)] if part)


def head(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version != "not installed")
    lines = [f"{results['device']}, {results['date']}, commit {results['commit']}: `{results['command']}`", versions]
    if results["before"]:
        lines.append("before: " + ", ".join(f"{key} {value}" for key, value in results["before"].items()))
    if results["tiny"]:
        lines.append("**Toy sizes: these numbers mean nothing.**")
    return "  \n".join(lines) + "\n"


def gpu_tables(results: dict) -> str:
    cells = results["cells"]
    trained = {name: found for name, found in cells.items() if "tokens_per_s" in found}
    ceiling = look_up(results, "ceilings", "gemm_ceiling")
    first = look_up(results, "ours_2048", "tokens_per_s.median")

    def steps() -> Iterable[list]:
        for name, found in trained.items():
            rate, memory = found["tokens_per_s"], found["memory"] or {}
            gib = [memory[kind] / 2**30 if memory else None for kind in ("allocated", "reserved")]
            yield [
                name,
                *(rate[key] for key in ("median", "min", "max")),
                found["model_flops_per_s"] / 1e12,
                found.get("mfu"),
                found["model_flops_per_s"] / ceiling if ceiling else None,
                *gib,
                found["mb_per_token"],
                f"{found['micro_rows']} x {found['row']}{', recomputed' if found['recompute'] else ''}",
                rate["median"] / first if first and "2048" in name else None,
                found["gate"]["gradients"],
            ]

    columns = ["step", "tokens/s", "min", "max", "TFLOP/s", "MFU", "of GEMM ceiling", "GiB allocated", "reserved", "MB/token"]
    parts = [rows([*columns, "micro-batch", "of ours_2048", "gradient error"], steps())]

    kinds = list(dict.fromkeys(kind for found in trained.values() for kind in found["breakdown"]))
    times = ([name, *(1e3 * found["breakdown"].get(kind, 0.0) for kind in kinds)] for name, found in trained.items())
    parts.append(rows(["ms of a step", *kinds], times))

    halves = [(name, key, value) for name, found in cells.items() for key, value in found.items() if key.startswith("ours_against_")]
    names = ("forward", "backward", "forward_memory", "backward_memory")
    body = [[f"{name}, {key.removeprefix('ours_against_')}", *(value.get(half) for half in names)] for name, key, value in halves]
    body += [[f"{name}, published", *PUBLISHED[name]] for name in cells if name in PUBLISHED]
    parts.append(rows(["against peft", "forward", "backward", "forward memory", "backward memory"], body))

    if "gemm" in cells.get("ceilings", {}):
        found = cells["ceilings"]
        body = [["copy, TB/s", found["copy"]["bytes_per_s"] / 1e12]]
        body += [[f"gemm {name}, TFLOP/s", one["flops_per_s"] / 1e12] for name, one in found["gemm"].items()]
        body += [
            [f"attention {name} {half}, TFLOP/s", one[f"{half}_flops_per_s"] / 1e12 if "unavailable" not in one else None]
            for name, one in found["attention"].items()
            for half in ("forward", "backward")
        ]
        body += [[f"link {name}, GB/s", rate / 1e9] for name, rate in found.get("link", {}).items()]
        parts.append(rows(["ceiling", "measured"], body))
    if "until" in cells.get("cold_start", {}):
        parts.append(rows(["cold start, until", "s"], cells["cold_start"]["until"].items()))
    return "\n".join(part for part in parts if part)


def micro_table(name: str, found: dict) -> str:
    """Of one operation: a row for each way to compute it, a column for each T. Marked *: the host was too late for most of the times,
    which may have launches in them."""
    if "rows" not in found:
        return ""
    sizes = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    at = {(row["way"], row["half"], row["tokens"]): row for row in found["rows"]}

    def value(way: str, half: str, tokens: int) -> str:
        row = at.get((way, half, tokens))
        if row is None:
            return "-"
        if "unavailable" in row:
            return row["unavailable"][:40]
        late = "*" if 2 * row["seconds"].get("late", 0) > row["seconds"]["count"] else ""
        return shown(1e3 * row["seconds"]["median"]) + late + (f" ({row['of_floor']:.2f}x)" if row.get("of_floor") else "")

    ways = list(dict.fromkeys((row["way"], row["half"]) for row in found["rows"]))
    heads = [f"{name}, ms (times the floor)", *(f"{found.get('axis', 'T')} = {n}" for n in sizes)]
    table = rows(heads, ([f"{w} {h}", *(value(w, h, n) for n in sizes)] for w, h in ways))
    return table + "".join(f"\nnot here: {reason}\n" for reason in found["missing"])


# -- plot ------------------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    name: str
    low: float
    value: float
    high: float


def bars(results: dict) -> tuple[str, list[Bar]]:
    """What the plot shows: tokens/s of each step, or ms of each way at the largest T that it has."""
    if results["suite"] == "gpu":
        rates = {name: found["tokens_per_s"] for name, found in results["cells"].items() if "tokens_per_s" in found}
        return "tokens/s, median and range of steps", [Bar(name, r["min"], r["median"], r["max"]) for name, r in rates.items()]
    largest = {}
    for name, found in results["cells"].items():
        for row in found.get("rows", ()):
            if "seconds" in row:
                largest[f"{name} {row['way']} {row['half']} T={row['tokens']}"] = (name, row["way"], row["half"]), row["seconds"]
    last = {key: (label, s) for label, (key, s) in largest.items()}
    return "ms, median and range", [Bar(label, 1e3 * s["min"], 1e3 * s["median"], 1e3 * s["max"]) for label, s in last.values()]


def svg(title: str, drawn: list[Bar]) -> str:
    """Horizontal bars, with a line from the lowest to the highest."""
    left, width, line = 12 + 7 * max((len(bar.name) for bar in drawn), default=0), 520, 22
    top = max((bar.high for bar in drawn), default=1.0) or 1.0
    height = 40 + line * len(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for i, bar in enumerate(drawn):
        y, scale = 32 + line * i, width / top
        color = "#2a6f97" if "ours" in bar.name else "#9aa5ab"
        parts += [
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{left}" y="{y}" width="{bar.value * scale:.1f}" height="16" fill="{color}"/>',
            f'<line x1="{left + bar.low * scale:.1f}" x2="{left + bar.high * scale:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>',
            f'<text x="{left + bar.high * scale + 6:.1f}" y="{y + 12}">{shown(float(bar.value))}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def publish(file: Path) -> str:
    """The tables of a file of results; the plot is written beside it, as .svg."""
    results = json.loads(file.read_text(encoding="utf-8"))
    file.with_suffix(".svg").write_text(svg(*bars(results)), encoding="utf-8")
    return markdown(results)
