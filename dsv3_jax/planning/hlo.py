"""What a compiled program moves between devices, read from its HLO text."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from dsv3_jax.parallel.experts import OVERFLOW

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes of the mesh, of a whole step.

    sent: bytes that one device sends at least: of an all-reduce of n bytes over g devices
    2 n (g - 1) / g, of the others (g - 1) / g of the larger side. Of a ragged all-to-all the
    smaller side counts: its rows are what tokens there are, not what the buffer could hold.
    calls: executions. Loops count as often as they run, one whose end depends on data once, one
    that runs only after a receive buffer overflowed not at all; of a conditional counts the branch
    that sends least.
    """

    kind: str
    axes: tuple[str, ...]
    sent: int
    calls: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[su]\d+|bf16|f\d+\w*|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_OVERFLOW = re.compile(rf'op_name="[^"]*/{OVERFLOW}/')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(
    r"replica_groups=(mesh\[.*?\](?:, device_ids=\(.*?\))? \{[^}]*\}|\{\{.*?\}\}|\{\}|"
    r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)


def _split_shape(text: str) -> tuple[str, str]:
    """("(f32[2], s32[])" or "f32[2]{0}", what follows)."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: end + 1], text[end + 2 :]
    return text, ""


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Every computation's instructions by name, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    here: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = found.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            shape, rest = _split_shape(match[2])
            opcode, _, rest = rest.partition("(")
            here.append(_Instruction(match[1], shape, opcode, rest))
    return found, entry


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in the text of a shape."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(count * bits // 8)
    return sizes


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0) -> the array it stands for; "[2,4]T(1,0)" reshapes to nothing else."""
    target, _, source = text.rpartition("<=")
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", source)
    assert match is not None, text
    dimensions = [int(size) for size in match[1].split(",")]
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    if match[2]:
        ids = ids.transpose([int(axis) for axis in match[2].split(",")])
    shape = [int(size) for size in target.strip("[]").split(",")] if target else ids.shape
    return ids.reshape(shape)


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Device ids [groups, devices of a group] of a `replica_groups=` attribute's value.

    Raises:
      ValueError: a form that this reader does not know.
    """
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        groups = re.findall(r"\{([\d,]+)\}", text)
        return np.array([[int(device) for device in group.split(",")] for group in groups])
    if text.startswith("["):
        return _iota(text)
    if not text.startswith("mesh["):
        raise ValueError(f"replica_groups={text} has an unknown form")
    head, _, tail = text.rpartition(" {")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", head)}
    named = re.findall(r"'(\w+)'(:?)", tail)
    if any(colon for _, colon in named):
        raise ValueError(f"replica_groups={text} divides an axis, which is not supported")
    ids = np.arange(math.prod(sizes.values()))
    if order := re.search(r"device_ids=\((.*)\)", head):
        ids = _iota(order[1]).reshape(-1)
    ids = ids.reshape(tuple(sizes.values()))
    axes = [list(sizes).index(name) for name, _ in named]
    ids = np.moveaxis(ids, axes, range(-len(axes), 0))
    return ids.reshape(-1, math.prod(sizes[name] for name, _ in named))


def group_axes(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    coordinates = np.unravel_index(groups[0], tuple(sizes.values()))
    return tuple(
        axis for axis, place in zip(sizes, coordinates, strict=True) if len(set(place.tolist())) > 1
    )


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """How often a loop runs; once where it depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = dict(_CALLED.findall(loop.rest)).get("condition", "")
    constants = [
        int(value[1])
        for instruction in computations.get(condition, [])
        if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest))
    ]
    compares = [i for i in computations.get(condition, []) if i.opcode in ("compare", "fusion")]
    return constants[0] if len(constants) == 1 and len(compares) == 1 else 1


def _sent(instruction: _Instruction, kind: str, group: int, operands: int) -> int:
    """Bytes that one device sends in one execution."""
    results = array_bytes(instruction.shape)
    # An asynchronous start's shape holds its operands too.
    result = max(results, default=0) if instruction.opcode.endswith("-start") else sum(results)
    if kind == "all-reduce":
        return 2 * sum(results) * (group - 1) // group
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return sum(results) * (group - 1)
    if kind == "ragged-all-to-all":
        result = min(result, operands) if operands else result
    return result * (group - 1) // group


class _Reader:
    """Adds up the collectives of a program, from its entry down."""

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        self.computations, self.entry = _computations(text)
        self.sizes = sizes
        self.devices = math.prod(sizes.values())
        self.shapes = {i.name: i.shape for body in self.computations.values() for i in body}
        self.done: dict[str, dict] = {}

    def total(self, name: str) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
        """{(kind, axes): (bytes, calls)} of one execution of a computation."""
        if name not in self.done:
            sums: dict = defaultdict(lambda: (0, 0))
            for instruction in self.computations.get(name, []):
                for key, (sent, calls) in self._of(instruction):
                    before = sums[key]
                    sums[key] = (before[0] + sent, before[1] + calls)
            self.done[name] = dict(sums)
        return self.done[name]

    def _of(self, instruction: _Instruction) -> Iterator[tuple]:
        if _OVERFLOW.search(instruction.rest):
            return
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield self._collective(instruction, kind)
            return
        if instruction.opcode in ("async-update", "async-done", "call-done"):
            return  # their start has been counted
        if branches := _BRANCHES.search(instruction.rest):
            totals = [self.total(name.strip(" %")) for name in branches[1].split(",")]
            lightest = min(totals, key=lambda t: sum(sent for sent, _ in t.values()))
            yield from lightest.items()
            return
        times = _trips(instruction, self.computations) if instruction.opcode == "while" else 1
        for role, name in _CALLED.findall(instruction.rest):
            if role != "condition":
                for key, (sent, calls) in self.total(name).items():
                    yield key, (sent * times, calls * times)

    def _collective(self, instruction: _Instruction, kind: str) -> tuple:
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.rest)
            groups = replica_groups(f"{{{pairs[1]}}}" if pairs else "{}", self.devices)
        else:
            match = _GROUPS.search(instruction.rest)
            groups = replica_groups(match[1] if match else "{}", self.devices)
        first = re.match(r"%?([\w.\-]+)", instruction.rest)
        operand = sum(array_bytes(self.shapes.get(first[1], ""))) if first else 0
        axes = group_axes(groups, self.sizes)
        return (kind, axes), (_sent(instruction, kind, groups.shape[1], operand), 1)


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """All collectives of a compiled program, the largest first; single-device groups left out.

    Args:
      text: `compiled.as_text()`.
      sizes: the mesh's axes in order; devices are numbered along them, the last fastest.
    """
    reader = _Reader(text, sizes)
    found = (
        Collective(kind, axes, sent, calls)
        for (kind, axes), (sent, calls) in reader.total(reader.entry).items()
        if axes
    )
    return sorted(found, key=lambda c: -c.sent)
