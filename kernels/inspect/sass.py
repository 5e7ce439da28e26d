"""Reads a compiled kernel: registers, spills, instructions of its main loop. The disassembler is in Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L\w*):")
TARGET = re.compile(r"\((\.L\w*)\)")
MMA = re.compile(r"^(HMMA|HGMMA|QGMMA|IMMA|DMMA|BGMMA|IGMMA|OMMA|QMMA|UTC\w*MMA)\b")
COPY = re.compile(r"^(LDGSTS|UTMA|UBLKCP)")
SHORT_LOOP = 8  # instructions; shorter loops only wait on a barrier
KINDS = (  # of instructions, the first that matches
    ("mma", MMA),
    ("exp2", re.compile(r"^MUFU\.EX2")),
    ("shuffle", re.compile(r"^(SHFL|REDUX|CREDUX)")),
    ("barrier", re.compile(r"^(BAR|WARPSYNC|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|UCGABAR)")),
    ("async copy", COPY),
    ("global", re.compile(r"^(LDG|STG|LD|ST|RED|ATOM|ATOMG)\b")),
    ("local", re.compile(r"^(LDL|STL)\b")),
    ("shared", re.compile(r"^(LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM)\b")),
    ("float", re.compile(r"^(F(ADD|MUL|FMA|MNMX|SEL|SETP?|CHK)|H(ADD2|MUL2|FMA2|MNMX2)|MUFU|F2F|F2FP|F2I|I2F)")),
    ("branch", re.compile(r"^(BRA|EXIT|RET|CALL|BSSY|BSYNC|BREAK|JMP|WARPSYNC|NANOSLEEP|YIELD)\b")),
)


@dataclass(frozen=True)
class Binary:
    """Figures of a cubin with one kernel."""

    registers: int
    stack_bytes: int
    spill_bytes: int  # stored to or loaded from local memory by the instructions as written
    loop_spill_bytes: int  # of those, in the main loop
    instructions: int
    stores: int  # instructions that write global memory
    mma: tuple[str, ...]  # kinds of tensor-core instructions
    loop: dict[str, int]  # instructions of the main loop by kind, with their number as "all"


def read(cubin: bytes) -> Binary:
    """Disassembles a cubin. Raises RuntimeError if the tools of Triton's wheel fail."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage[-400:]}")
    code = parse(listing)
    body = _main_loop(code)
    return Binary(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spill_bytes=_spilled(code),
        loop_spill_bytes=_spilled(body),
        instructions=sum(i.name != "NOP" for i in code),  # which pad the end
        stores=sum(bool(re.match(r"^(STG|ST|RED|ATOM|ATOMG|UTMASTG|UTMAREDG|UBLKRED)\b", i.name)) for i in code),
        mma=tuple(sorted({_mma_kind(i) for i in code if MMA.match(i.name)})),
        loop={**_count(body), "all": len(body)},
    )


def _run(tool: str, *arguments: str) -> str:
    run = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool} failed: {run.stderr[-400:]}")
    return run.stdout


@dataclass(frozen=True)
class Instruction:
    name: str
    operands: str
    jump: int | None  # index of the instruction that a branch goes to
    last: bool = False  # whether control never goes on to the next one


def parse(listing: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := INSTRUCTION.search(line):
            found.append((instruction[1] or "", instruction[2], instruction[3]))
    code = []
    for predicate, name, operands in found:
        target = TARGET.search(operands) if name.startswith("BRA") else None
        alone = not predicate and re.fullmatch(r"\s*`?(\(\.L\w*\))?\s*", operands) is not None
        last = alone and name.split(".")[0] in ("BRA", "EXIT")
        code.append(Instruction(name, operands, labels.get(target[1]) if target else None, last))
    return code


def _main_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop with the most tensor-core instructions; without any, the longest innermost loop.

    Of several it is the one that copies ahead, since another takes the last, ragged tile. Of those it is the smallest.
    Short loops inside it are left out: an iteration that waits only once runs none of them.
    """
    every = _loops(code)
    loops = [loop for loop in every if len(loop) >= SHORT_LOOP]
    if not loops:
        return []

    def count(kind: re.Pattern[str], loop: frozenset[int]) -> int:
        return sum(bool(kind.match(code[i].name)) for i in loop)

    if any(count(MMA, loop) for loop in loops):
        best = max(loops, key=lambda loop: (count(MMA, loop), count(COPY, loop) > 0, -len(loop)))
    else:
        best = max((loop for loop in loops if not any(other < loop for other in loops)), key=len)
    rare: set[int] = set()
    for wait in (loop for loop in every if loop < best and len(loop) < SHORT_LOOP):
        behind = max(wait) + 1
        rare |= wait | ({behind} if code[behind].last else set())  # with the jump back into the loop
    return [code[i] for i in sorted(best - rare)]


def _loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as the instructions in each.

    The place of code means little. A compiler puts rare code, such as a second wait on a barrier, behind everything
    else, and its jump back spans all that lies between.
    """
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for at, instruction in enumerate(code):
        for to in {at + 1 if not instruction.last else None, instruction.jump}:
            if to is not None and to < len(code):
                after[at].append(to)
                before[to].append(at)
    reachable = _reach([0], after) if code else set()
    loops = []
    for head in {i.jump for i in code if i.jump is not None} & reachable:
        avoiding = _reach([0], after, head) if head else set()
        if back := [at for at in before[head] if at in reachable and at not in avoiding]:  # the head dominates them
            loops.append(frozenset((_reach(back, before, head) | {head}) & reachable))
    return loops


def _reach(starts: list[int], edges: list[list[int]], closed: int | None = None) -> set[int]:
    """The nodes that can be reached without passing ``closed``."""
    seen = {start for start in starts if start != closed}
    stack = list(seen)
    while stack:
        for to in edges[stack.pop()]:
            if to != closed and to not in seen:
                seen.add(to)
                stack.append(to)
    return seen


def _count(body: list[Instruction]) -> dict[str, int]:
    counts = Counter(next((kind for kind, rule in KINDS if rule.match(i.name)), "integer and other") for i in body)
    return dict(counts.most_common())


def _spilled(code: list[Instruction]) -> int:
    """Bytes per thread that local-memory instructions move, each counted once."""
    widths = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    spills = [i.name.split(".") for i in code if re.match(r"^(STL|LDL)\b", i.name)]
    return sum(next((widths[part] for part in parts[1:] if part in widths), 4) for parts in spills)


def _mma_kind(instruction: Instruction) -> str:
    """Name, shape and operand type, as far as the disassembler names them: ``HGMMA.64x256x16.F32.BF16``."""
    return re.sub(r"\.(gdesc|GSB0|ALL|\w*REUSE\w*)\b", "", instruction.name)
