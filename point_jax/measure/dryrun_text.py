"""The record of a dry run as text, aligned for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from point_jax.measure.chips import GIB, GIGA, MIB, TERA

_SIZES = (
    ("student", "parameters, student"),
    ("teacher", "parameters, teacher"),
    ("optimizer", "optimizer, two moments"),
    ("batch", "batch"),
    ("padding", "padding of these to whole tiles"),
    ("gradients", "gradients"),
    ("activations", "activations kept for the backward pass of a piece"),
    ("other_temporaries", "other temporaries"),
    ("outputs", "outputs not in the place of arguments"),
    ("code", "code"),
    ("needed", "needed"),
    ("limit", "there"),
)


def verdict(record: Mapping[str, Any]) -> str:
    """Fits or not, in words."""
    memory = record["memory"]
    needed, limit = memory["needed"], memory["limit"]
    if limit is None:
        return f"needs {_gib(needed)} a device; how much there is is not known"
    word = "fits" if memory["fits"] else "does not fit"
    return f"{word}: needs {_gib(needed)} of {_gib(limit)} a device"


def record_text(record: Mapping[str, Any]) -> str:
    """All lines."""
    return "\n".join(_lines(record))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    chips, devices = record["chips"], record["devices"]
    of_chips = "" if chips == devices else f" on {chips} chips"
    yield (
        f"{record['topology']}: {devices} devices{of_chips}, {record['batch']} scenes a step, "
        f"{record['scenes_per_device']} a device"
    )
    lower, compiling = record["lower_s"], record["compile_s"]
    yield f"traced and lowered in {lower:.0f} s, compiled in {compiling:.0f} s"
    yield verdict(record)
    yield ""
    memory = record["memory"]
    rows = [(words, _gib(memory[key])) for key, words in _SIZES if memory.get(key) is not None]
    yield from _table([("memory of a device", ""), *rows])
    if "flop_done" not in record:
        return
    yield ""
    yield from _table([("a step on a device, rows full", ""), *_work(record)])
    if record["collectives"]:
        yield ""
        head = ("collective", "of", "devices", "slices or hosts", "runs", "MB")
        yield from _table([head, *map(_collective, record["collectives"])])
    if record["roofline"]:
        yield ""
        yield from _roofline(record)
    for scope in record["loops_of_unknown_length"]:
        yield f"counted once, since its length is not known: {scope}"


def _work(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    precisions = ", ".join(
        f"{name} {number / TERA:.2f}" for name, number in record["flop_by_precision"].items()
    )
    yield "TFLOP done", f"{record['flop_done'] / TERA:.2f} ({precisions})"
    if record["flop_needed"]:
        needed = record["flop_needed"] / record["devices"] / TERA
        full = " ".join(f"{share:.0%}" for share in record["rows_full"])
        yield "TFLOP needed by a furnished room", f"{needed:.2f} (fills {full} of the levels)"
    yield "GB moved between memory and device", f"{record['bytes_moved'] / GIGA:,.0f}"
    yield "kernels started", f"{record['kernels']:,.0f}"
    yield "turns of loops that end where their data say", f"{record['turns']:,.0f}"


def _collective(one: Mapping[str, Any]) -> tuple[str, ...]:
    size = f"{one['bytes'] / 1e6:,.2f}"
    runs = f"{one['times']:,.0f}"
    return one["kind"], one["dtype"], str(one["group"]), str(one["domains"]), runs, size


def _roofline(record: Mapping[str, Any]) -> Iterator[str]:
    line, chip = record["roofline"], record["constants"]
    seconds = line["seconds"]
    rows = [("roofline", "ms")]
    rows += [(f"  {part}", _ms(time)) for part, time in line["parts"].items()]
    rows += [
        ("step", _ms(seconds)),
        ("products alone", _ms(line["products"])),
        ("memory alone", _ms(line["memory"])),
    ]
    yield from _table(rows)
    yield f"{record['points_per_s']:,.0f} scene points/s over all devices"
    of = f"utilisation {record['utilisation_done']:.1%} by operations done"
    needed = record["utilisation_needed"]
    yield of + (f", {needed:.1%} by those needed" if needed else "")
    yield (
        f"constants of a device: {chip['half_flops'] / TERA:.1f} TFLOP/s bfloat16, "
        f"{chip['single_flops'] / TERA:.1f} float32, {chip['bandwidth'] / GIGA:,.0f} GB/s memory, "
        f"{chip['links'] / GIGA:,.0f} GB/s links, {chip['network'] / GIGA:.1f} GB/s network"
    )
    if chip["start"] or chip["turn"]:
        yield (
            f"measured: {chip['start'] * 1e6:.1f} us from one short kernel to the next, "
            f"{chip['turn'] * 1e6:.0f} us for the host to look whether a loop goes on"
        )


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _gib(size: float) -> str:
    """GiB, or MiB for less than a hundredth."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 100 else f"{size / MIB:.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
