"""A plan as text and as JSON."""

import collections
import dataclasses
from collections.abc import Sequence

from plm.planning.plans import LISTED, Attempt, Plan, gib
from plm.training.chips import peak_flops


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the whole run. compute_seconds: of a step at the stated part of the chips' peak; link_seconds: the least that
    its collectives need of the links between chips; a step is taken to last the longer of the two. None: not known."""

    utilisation: float
    compute_seconds: float | None
    link_seconds: float | None
    hours: float | None
    chip_hours: float | None
    price: float | None


def cost(plan: Plan, utilisation: float, price_per_chip_hour: float) -> Cost:
    """flops / (chips x peak x utilisation) seconds a step; the price of a chip's hour in any currency."""
    peak, links = peak_flops(plan.topology.kind, plan.compute), plan.topology.chip.links
    moved = None
    if plan.collectives is not None and links:
        # To add up over a ring, every byte travels twice.
        moved = sum(c.bytes * c.times * (2 if c.kind == "all-reduce" else 1) for c in plan.collectives) / links
    if plan.flops is None or peak is None:
        return Cost(utilisation, None, moved, None, None, None)
    seconds = plan.flops / (plan.topology.count * peak * utilisation)
    if plan.steps is None:
        return Cost(utilisation, seconds, moved, None, None, None)
    hours = max(seconds, moved or 0.0) * plan.steps / 3600
    chip_hours = hours * plan.topology.count
    return Cost(utilisation, seconds, moved, hours, chip_hours, chip_hours * price_per_chip_hour or None)


def _time(plan: Plan, costs: Cost) -> list[str]:
    if costs.compute_seconds is None:
        return []
    lines = [f"at {costs.utilisation:.0%} of the peak: {costs.compute_seconds:.3g} s a step"]
    if costs.link_seconds is not None:
        lines[0] += f"; its collectives need at least {costs.link_seconds:.3g} s of the links"
        if costs.link_seconds > costs.compute_seconds:
            lines.append("the links are the limit: this utilisation cannot be reached on this mesh with this batch")
    if costs.hours is not None:
        price = f", price {costs.price:,.0f}" if costs.price is not None else ""
        after = f" after {plan.done_steps:,} of another run" if plan.done_steps else ""
        lines.append(f"{plan.steps:,} steps{after}: {costs.hours:,.1f} h, {costs.chip_hours:,.0f} chip hours{price}")
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart: the first and the last to the left, those between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip()

    return [line(row) for row in rows]


def _by_kind(plan: Plan) -> list[tuple[str, int, int]]:
    """(kind, how many a step runs, bytes a step) of the collectives."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for c in plan.collectives or ():
        counts[c.kind][0] += c.times
        counts[c.kind][1] += c.bytes * c.times
    return sorted(((kind, n, size) for kind, (n, size) in counts.items()), key=lambda row: -row[2])


def _memory(plan: Plan) -> list[list[str]]:
    m = plan.memory
    about = "" if m.exact else ", by counting (no compiler)"
    return [
        ["parameters", gib(m.parameters)],
        ["optimizer", gib(m.optimizer)],
        *([["carried states", gib(m.carry)]] if m.carry else []),
        ["batch", gib(m.batch)],
        [f"activations, gradients, other temporaries{about}", gib(m.temporaries)],
        ["together", gib(m.peak)],
        ["a chip has", gib(m.available)],
        *([["while scoring held-out text", gib(plan.evaluation)]] if plan.evaluation is not None else []),
    ]


def to_text(plan: Plan, costs: Cost, tried: Sequence[Attempt]) -> str:
    """The plan for people."""
    m = plan.memory
    settings = ", ".join(f"{key}={value}" for key, value in plan.settings.items() if not key.startswith("mesh."))
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    verdict = f"FITS, {gib(m.free)} to spare" if m.fits else f"DOES NOT FIT, {gib(-m.free)} too much"
    lines = [
        f"{plan.topology.name}: {plan.topology.count} x {plan.topology.kind}, mesh {mesh}",
        f"{plan.parameters:,} parameters; {settings}",
        "",
        f"{verdict}{'' if m.exact else ' (an estimate: GPUs are not compiled for)'}",
        "",
        *("  " + line for line in table([["a chip holds", "", ""], *([*row, ""] for row in _memory(plan))])),
        "",
    ]
    if plan.flops is None:
        lines.append("FLOPs: the formula of a model from outside is not known")
    else:
        lines.append(
            f"FLOPs by formula: {plan.flops:.3e} a step, {plan.flops / plan.tokens_per_step:.3e} a token,"
            f" {plan.flops / plan.topology.count:.3e} a step and chip"
        )
    lines += _time(plan, costs)
    if plan.collectives is not None:
        lines += ["", "collectives of a step, as one chip takes part in them"]
        rows = [[kind, f"{n:,}", gib(size), ""] for kind, n, size in _by_kind(plan)] or [["none", "", "", ""]]
        largest = plan.collectives[:LISTED]
        rows += [
            [f"  {c.kind}", f"{c.times:,} x", gib(c.bytes), f"{c.where}: {_shapes(c.shapes)}"]
            for c in largest
            if c.bytes * c.times >= 2**20
        ]
        lines += ["  " + line for line in table(rows)]
    if plan.buffers:
        lines += ["", "largest buffers on a chip (not all at one time)"]
        lines += ["  " + line for line in table([[b.shape, gib(b.bytes), b.where] for b in plan.buffers[:LISTED]])]
    if plan.warnings:
        lines += ["", "warnings", *(f"  {line}" for line in plan.warnings)]
    if tried:
        last = tried[-1]
        fits = last.memory is not None and last.memory.fits
        what = f"the smallest change that fits: {changes(last)}" if fits else "nothing that was tried fits"
        lines += ["", what, *("  " + line for line in attempts_table(tried))]
    return "\n".join(lines) + "\n"


def _shapes(shapes: Sequence[str]) -> str:
    return " ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")


def changes(attempt: Attempt) -> str:
    """As flags."""
    return " ".join(f"--config.{key}={value}" for key, value in attempt.changes.items())


def attempts_table(attempts: Sequence[Attempt]) -> list[str]:
    """A line for each setting that was tried."""
    rows = [["tried", "fits", "a chip needs", "moved a step", ""]]
    for a in attempts:
        if a.memory is None:
            rows.append([changes(a), "refused", "", "", a.refusal])
        else:
            moved = "" if a.traffic is None else gib(a.traffic)
            rows.append([changes(a), "yes" if a.memory.fits else "no", gib(a.memory.peak), moved, ""])
    return table(rows)


def to_json(plan: Plan, costs: Cost, tried: Sequence[Attempt]) -> dict:
    """The plan for programs; bytes, seconds, operations."""
    m = plan.memory
    return {
        "topology": plan.topology.name,
        "device_kind": plan.topology.kind,
        "chips": plan.topology.count,
        "mesh": plan.mesh,
        "settings": plan.settings,
        "parameters": plan.parameters,
        "fits": m.fits,
        "exact": m.exact,
        "memory": {**dataclasses.asdict(m), "peak": m.peak, "free": m.free, "evaluation_peak": plan.evaluation},
        "flops": {
            "step": plan.flops,
            "token": None if plan.flops is None else plan.flops / plan.tokens_per_step,
        },
        "run": {
            "steps": plan.steps,
            "done_steps": plan.done_steps,
            "tokens_per_step": plan.tokens_per_step,
            **dataclasses.asdict(costs),
        },
        "collectives": {kind: {"times": n, "bytes": size} for kind, n, size in _by_kind(plan)}
        if plan.collectives is not None
        else None,
        "largest_collectives": [dataclasses.asdict(c) for c in (plan.collectives or ())[:LISTED]],
        "largest_buffers": [dataclasses.asdict(b) for b in plan.buffers[:LISTED]],
        "warnings": plan.warnings,
        "tried": [attempt_to_json(a) for a in tried],
        "compile_seconds": plan.compile_seconds,
    }


def attempt_to_json(attempt: Attempt) -> dict:
    memory = attempt.memory
    return {
        "changes": attempt.changes,
        "fits": None if memory is None else memory.fits,
        "peak": None if memory is None else memory.peak,
        "moved": attempt.traffic,
        "refusal": attempt.refusal,
    }
