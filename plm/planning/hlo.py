"""What a compiled program moves and holds, read from its text (optimized HLO, one device's part of it)."""

import dataclasses
import math
import re

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred|bf16)\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(?:mesh\[[^\]]*\]\s*\{[^}]*\}|\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# These hold nothing of their own: they name, pass on or wait.
_NO_BUFFER = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
    "optimization-barrier",
    "after-all",
    "partition-id",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective as one device takes part in it: `bytes` of its result (reduce-scatter: of its operand), `times` a
    step. shapes: of the result; where: the operation of the model's code that it belongs to."""

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    times: int
    where: str


@dataclasses.dataclass(frozen=True)
class Buffer:
    """The result of an instruction in a device's main memory."""

    shape: str
    dimensions: tuple[int, ...]
    bytes: int
    where: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    result: str
    line: str

    def called(self) -> dict[str, list[str]]:
        return {kind: re.findall(r"%([\w.\-]+)", names) for kind, names in _CALLED.findall(self.line)}


def _arrays(result: str) -> list[tuple[str, tuple[int, ...], int, bool]]:
    """(shape, dimensions, bytes, in main memory) of every array of an instruction's result."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(result):
        dimensions = tuple(int(size) for size in sizes.split(",") if size)
        width = _BYTES.get(kind) or max(int(re.sub(r"\D", "", kind)), 8) // 8
        elsewhere = re.search(r"S\([1-9]\)", layout or "")
        found.append((f"{kind}[{sizes}]", dimensions, width * math.prod(dimensions), not elsewhere))
    return found


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """({computation: instructions}, the entry's name)."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            if match:
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(match[2]) if match else None
        if opcode:
            current.append(_Instruction(opcode[1], match[2][: opcode.start(1)], match[2]))
    return computations, entry


def _trips(instructions: list[_Instruction]) -> int:
    """Times a loop runs whose condition this is: a scan counts from 0 up to a constant."""
    constants = [int(n) for i in instructions for n in re.findall(r"\[\][^ ]* constant\((\d+)\)", i.line)]
    return max(constants, default=1)


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
    """{computation: (how often a step runs it, whether it is only a part of fusions)} of all that the entry reaches."""
    reached: dict[str, tuple[int, bool]] = {}
    pending = [(entry, 1, False)]
    while pending:
        name, times, fused = pending.pop()
        before = reached.get(name)
        if name not in computations or (before and before[0] >= times and before[1] <= fused):
            continue
        reached[name] = (max(times, before[0] if before else 0), fused and (before[1] if before else True))
        for instruction in computations[name]:
            called = instruction.called()
            inner = times
            if instruction.opcode == "while":
                inner = times * _trips(computations.get(called["condition"][0], []))
            inside = fused or instruction.opcode == "fusion"
            for kind, names in called.items():
                if kind != "condition":
                    pending += [(other, inner, inside) for other in names]
    return reached


def where(line: str) -> str:
    """The model's operation of an instruction, without what every name begins with."""
    match = _OP_NAME.search(line)
    name = match[1] if match else ""
    backward = "transpose(" in name
    name = re.sub(r"jit\([\w<>]*\)/?|while/body/(closed_call/)?|checkpoint/|rematted_computation/", "", name)
    name = re.sub(r"(transpose\(|jvp\(|\))+/?", "", name).strip("/")
    return (f"{name} (backward)" if backward else name) or "?"


def _group_size(line: str) -> int:
    match = _GROUPS.search(line)
    if match and match[1]:
        return len(match[1].split(","))
    if match and match[3]:
        return int(match[3])
    sizes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if not sizes:
        return 1
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes[1])}
    return math.prod(axes.get(name, 1) for name in re.findall(r"'(\w+)'", sizes[2]))


def collectives(text: str) -> list[Collective]:
    """The collectives of a step, those in loops as often as they run, the largest traffic first.

    An asynchronous collective counts once, at its start; the pieces of one that the TPU compiler spreads over several
    fusions share its channel and count once too.
    """
    computations, entry = _parse(text)
    found: dict[tuple, Collective] = {}
    for name, (times, _) in _times(computations, entry).items():
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            arrays = _arrays(instruction.result)
            if instruction.opcode.endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
                arrays = arrays[1:2]  # (operand, result, ...)
            size = sum(nbytes for _, _, nbytes, _ in arrays)
            if kind == "reduce-scatter":
                size *= _group_size(instruction.line)
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            shapes = tuple(shape for shape, *_ in arrays)
            place = where(instruction.line)
            key = (channel[1] if channel else name, kind, place, shapes)
            if key not in found or found[key].times < times:
                found[key] = Collective(kind, shapes, size, times, place)
    return sorted(found.values(), key=lambda c: -c.bytes * c.times)


def buffers(text: str) -> list[Buffer]:
    """The results that lie in main memory while a step runs, the largest first, each shape and place once.

    They do not all live at one time. Arguments are left out.
    """
    computations, entry = _parse(text)
    found: dict[tuple[str, str], Buffer] = {}
    for name, (_, fused) in _times(computations, entry).items():
        if fused:
            continue
        for instruction in computations[name]:
            if instruction.opcode in _NO_BUFFER or instruction.opcode.endswith(("-done", "-update")):
                continue
            for shape, dimensions, size, in_memory in _arrays(instruction.result):
                if in_memory:
                    place = where(instruction.line)
                    found.setdefault((shape, place), Buffer(shape, dimensions, size, place))
    return sorted(found.values(), key=lambda b: -b.bytes)
