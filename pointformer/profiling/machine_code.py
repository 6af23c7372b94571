"""Instructions of a compiled kernel, loop by loop, read from its machine code without a GPU.

A loop of the machine code is a branch back and what lies between its target and itself. Its line in
the source tells which `for` or `while` it is; its *path* is the names of the source loops around it
and its own, outermost first, such as `seed.least`. A loop's name is the variable that a `for`
counts, or the first one in the condition of a `while`.

Compilers make several loops of one, which take a few rounds together as long as there are that many
and then the rest one by one; `unroll` says how many rounds of the source one of the machine is.
Both sides of a branch within a round count: a count is the most that a round can issue.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)  # H100 and H200
# Kind of an instruction by the beginning of its name, the first that fits (LDGDEPBAR is a barrier
# and no LDG, REDUX no RED); "other" is what is not listed.
_KINDS = {
    "matrix": ("HMMA", "HGMMA", "IMMA", "DMMA"),
    "special": ("MUFU",),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "barrier": ("BAR", "BSYNC", "BSSY", "WARPSYNC", "DEPBAR", "LDGDEPBAR"),
    "load": ("LDG", "LD.", "UTMALDG"),
    "store": ("STG", "ST.", "ATOM", "RED"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "float": ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "DFMA", "DMUL", "DADD"),
    "convert": ("F2F", "I2F", "F2I", "FRND"),
    "branch": ("BRA", "EXIT", "CALL", "RET", "NOP", "BREAK"),
    "spill": ("STL", "LDL"),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: without its predicate.
        predicated: whether it has one.
        target: label that a branch goes to.
        source: name of the file and line it was compiled from, of the innermost function.
    """

    text: str
    predicated: bool
    target: str | None
    source: tuple[str, int]

    @property
    def kind(self) -> str:
        name = self.text.split()[0]
        for kind, beginnings in _KINDS.items():
            if name.startswith(beginnings):
                return kind
        return "other"


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code.

    Attributes:
        path: names of the source's loops, outermost first, joined by dots.
        source: the line of the source's loop: loops of the same one were copied or unrolled.
        counts: instructions of a round by kind, those of loops inside of it left out.
        unroll: rounds of the source's loop that a round takes.
        inner: whether it has no loops inside.
    """

    path: str
    source: tuple[str, int]
    counts: Mapping[str, int]
    unroll: int = 1
    inner: bool = True

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Code:
    """A kernel: its loops in the order of the code, and the instructions outside of all loops."""

    loops: tuple[Loop, ...]
    straight: Mapping[str, int] = field(default_factory=dict)

    def per_round(self) -> dict[str, float]:
        """Instructions for a round of each loop of the source, by path; "" is what is outside.

        Of a loop that was unrolled, those of the copy that takes the most rounds at a time. Loops
        of one path, such as those of a function that is called twice, add up.
        """
        rows: dict[str, float] = {"": float(sum(self.straight.values()))}
        groups: dict[tuple[str, tuple[str, int]], list[Loop]] = {}
        for loop in self.loops:
            groups.setdefault((loop.path, loop.source), []).append(loop)
        for (path, _), same in groups.items():
            most = max(loop.unroll for loop in same)
            chosen = sum(loop.instructions for loop in same if loop.unroll == most) / most
            rows[path] = rows.get(path, 0.0) + chosen
        return rows

    def issued(self, rounds: Mapping[str, float]) -> float:
        """Instructions that a warp issues, given how many rounds of each loop there are in all.

        Raises:
            KeyError: a loop of the code is not in `rounds`.
        """
        total = 0.0
        for path, instructions in self.per_round().items():
            total += instructions * (rounds_of(rounds, path) if path else 1)
        return total


def rounds_of(rounds: Mapping[str, float], path: str) -> float:
    """Rounds of the loop at a path: given for the path, or for its last name."""
    return rounds[path] if path in rounds else rounds[path.rsplit(".", 1)[-1]]


def machine_code(compiled: Any) -> Code:
    """Of what `triton.compile` returned for an NVIDIA target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-gi", "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse(text, _source_files(compiled))


def _source_files(compiled: Any) -> dict[str, ast.Module]:
    """The files of this package's kernels by name: caches keep other checkouts' paths."""
    folder = Path(inspect.getfile(compiled.src.fn.fn)).parent if compiled.src else None
    if folder is None:
        return {}
    return {path.name: _tree(path) for path in folder.glob("*.py")}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def parse(text: str, files: Mapping[str, ast.Module]) -> Code:
    """Code from the disassembler's text, with the syntax trees of the source's files by name."""
    code, labels = _instructions(text)
    following = list(_flow(code, labels))
    reached = _reach(0, following)
    preceding: list[list[int]] = [[] for _ in code]
    for index in reached:
        for after in following[index]:
            preceding[after].append(index)
    bodies: dict[int, set[int]] = {}  # by the first instruction
    backs: dict[int, int] = {}  # the last branch back
    for index in sorted(reached):
        target = labels.get(code[index].target or "", index + 1)
        # A loop can only be entered at its first instruction; else code was moved out of the way.
        if target not in following[index] or target > index:
            continue
        if index in _reach(0, following, without=target):
            continue
        body = _reach(index, preceding, without=target) | {target}
        bodies[target] = bodies.get(target, set()) | body
        backs[target] = index
    order = sorted(bodies, key=lambda first: (-len(bodies[first]), first))
    owner: dict[int, int] = {}
    for first in order:
        owner.update(dict.fromkeys(bodies[first], first))
    loops: dict[int, Loop] = {}
    for first in order:
        inside = [code[index] for index in bodies[first] if owner[index] == first]
        name, source = _name(code[backs[first]], inside, files)
        around = [other for other in loops if first in bodies[other]]
        path = f"{loops[around[-1]].path}.{name}" if around else name
        inner = len(inside) == len(bodies[first])
        loops[first] = Loop(path, source, Counter(i.kind for i in inside), inner=inner)
    straight = Counter(code[index].kind for index in reached if index not in owner)
    return Code(tuple(_unrolled([loops[first] for first in sorted(loops)])), straight)


def _instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the place of each label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    source, fresh = ("", 0), True
    for line in text.splitlines():
        if where := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
            if fresh:  # the first of several lines is the innermost function
                source, fresh = (Path(where[1]).name, int(where[2])), False
        elif label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            target = re.search(r"`\((\.L_\w+)\)", found[2]) if found[2].startswith("BRA") else None
            code.append(Instruction(found[2], bool(found[1]), target and target[1], source))
            fresh = True
    return code, labels


def _flow(code: Sequence[Instruction], labels: Mapping[str, int]) -> Iterator[list[int]]:
    """Instructions that may follow each one. Calls return; threads of a warp that wait for each
    other in different places (BRA.DIV) are left out, they have code of their own for it."""
    for index, item in enumerate(code):
        name, *rest = item.text.split(maxsplit=1)
        jump = name.split(".")[0] == "BRA" and name != "BRA.DIV"
        # A branch may have its condition among its operands.
        conditional = item.predicated or (jump and not rest[0].startswith("`"))
        after = [index + 1] if index + 1 < len(code) else []
        if jump:
            yield [labels[item.target], *(after if conditional else [])] if item.target else after
        elif name.startswith(("EXIT", "RET")) and not conditional:
            yield []
        else:
            yield after


def _reach(start: int, edges: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """All that can be reached from `start`, itself too, on ways that avoid one place."""
    if start == without:
        return set()
    seen, waiting = {start}, [start]
    while waiting:
        for index in edges[waiting.pop()]:
            if index not in seen and index != without:
                seen.add(index)
                waiting.append(index)
    return seen


def _name(
    branch: Instruction, inside: Iterable[Instruction], files: Mapping[str, ast.Module]
) -> tuple[str, tuple[str, int]]:
    """Name and line of the source's loop: by the branch back, or by what most of a round is in."""
    file, line = branch.source
    for loop in _loops(files.get(file)):
        if loop.lineno == line:
            return _label(loop), branch.source
    votes: Counter[tuple[str, tuple[str, int]]] = Counter()
    for item in (branch, *inside):
        file, line = item.source
        around = [
            loop
            for loop in _loops(files.get(file))
            if loop.lineno <= line <= (loop.end_lineno or loop.lineno)
        ]
        if around:
            loop = max(around, key=lambda loop: loop.lineno)
            votes[_label(loop), (file, loop.lineno)] += 1
    return votes.most_common(1)[0][0] if votes else ("unknown", branch.source)


def _loops(tree: ast.Module | None) -> Iterator[ast.For | ast.While]:
    """Those that are loops of the machine, too."""
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.While) or (
            isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter)
        ):
            yield node


def _label(loop: ast.For | ast.While) -> str:
    if isinstance(loop, ast.For):
        return ast.unparse(loop.target)
    names = [node for node in ast.walk(loop.test) if isinstance(node, ast.Name) and node.id != "tl"]
    return min(names, key=lambda node: (node.lineno, node.col_offset)).id


def _unrolled(loops: list[Loop]) -> Iterator[Loop]:
    """Loops with how many rounds they take at a time, told by their loads and arithmetic."""
    for loop in loops:
        same = [x for x in loops if (x.path, x.source) == (loop.path, loop.source)]
        least = min(same, key=lambda other: other.instructions)
        # Copies of a function differ by little.
        larger = loop.inner and loop.instructions > 1.5 * least.instructions
        yield replace(loop, unroll=max(1, round(_size(loop) / _size(least)))) if larger else loop


def _size(loop: Loop) -> int:
    weight = sum(loop.counts.get(kind, 0) for kind in ("load", "special", "matrix"))
    return weight or loop.instructions
