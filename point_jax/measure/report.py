"""Records as text, aligned for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_WAYS = ("forward", "recomputed", "backward")
_FLOP = ("flop_needed", "flop_done")


def calibration_text(when: str, about: Mapping[str, Any]) -> str:
    """One line: the speed of a matrix product before or after the runs, and on what."""
    speeds = about["calibration"][when].items()
    listed = ", ".join(f"{dtype} {speed * 1e-9:.1f} GFLOP/s" for dtype, speed in speeds)
    where = f"{about['platform']} ({about['device_kind']}), {about['devices']} device(s)"
    machine = f"; {where}, {about['cores']} cores, jax {about['versions']['jax']}"
    return f"matrix product {when}: {listed}{machine if when == 'before' else ''}"


def record_text(record: Mapping[str, Any]) -> str:
    """The lines and the table of one input."""
    memory, spread = record["memory"], max(record["times_s"])
    source = " (loaded from --cache_dir)" if record["compiled_from_cache"] else ""
    planned = ", ".join(
        f"{name} {_megabytes(memory[f'{name}_bytes'])}"
        for name in ("temp", "argument", "output", "alias")
    )
    exchange = ""
    if record["exchange_s"]:
        exchange = f", its cores exchange 4 MB in {record['exchange_s'] * 1e6:.0f} us"
    lines = [
        "",
        f"{record['what']}, {record['input']}: {record['points']:,} points, {record['dtype']}, "
        f"{record['shapes']}",
        f"  trace and lower {record['lower_s']:.2f} s, "
        f"compile {record['compile_s']:.2f} s{source}, "
        f"second start {record['second_start_s']:.2f} s",
        f"  median {record['median_s']:.4g} s, min {record['min_s']:.4g} s, max {spread:.4g} s of "
        f"{len(record['times_s'])}; {record['points_per_s']:,.0f} points/s",
        f"  meanwhile the machine could multiply {record['machine_flop'] * 1e-9:,.1f} GFLOP"
        f"{exchange}",
        f"  peak memory {_megabytes(memory['peak_bytes'])} ({memory['how']}) above "
        f"{_megabytes(memory['parameter_bytes'])} of parameters",
        f"  planned by XLA: {planned}",
    ]
    if record["flops"]:
        lines.append(
            f"  {record['flop_needed'] * 1e-9:,.2f} GFLOP needed, "
            f"{record['flops'] * 1e-9:.1f} GFLOP/s, {record['machine_share']:.0%} of that"
        )
    if record["profile"]:
        lines.append(f"  profile: tensorboard --logdir {record['profile']}")
    if not record["parts"]:
        return "\n".join([*lines, "  the profile holds no instructions of this program"])
    return "\n".join([*lines, *(f"  {line}" for line in _table(record["parts"]))])


def _table(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parts as rows, the total last; columns that are empty everywhere are left out."""
    ways = [way for way in _WAYS[1:] if any(part[f"{way}_s"] for part in parts)]
    ways = ["forward", *ways] if ways else []
    work = any(part["flop_needed"] for part in parts)
    head = ["part", "ms", "%", *ways]
    head += ["GFLOP needed", "done", "GFLOP/s"] if work else []
    total = {
        "part": "total",
        **{key: sum(part[key] for part in parts) for key in ("seconds", "share", *_FLOP)},
        **{f"{way}_s": sum(part[f"{way}_s"] for part in parts) for way in _WAYS},
    }
    total["flops"] = total["flop_needed"] / total["seconds"]
    rows = [head]
    for part in (*parts, total):
        row = [part["part"], f"{1e3 * part['seconds']:,.2f}", f"{100 * part['share']:.1f}"]
        row += [_blank(1e3 * part[f"{way}_s"]) for way in ways]
        if work:
            row += [_giga(part[key]) for key in (*_FLOP, "flops")]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def _giga(number: float | None) -> str:
    return _blank((number or 0) * 1e-9)


def _blank(number: float) -> str:
    """Two decimals; nothing for 0."""
    return f"{number:,.2f}" if number else ""


def _megabytes(number: float | None) -> str:
    return "unknown" if number is None else f"{number / 2**20:,.1f} MB"
