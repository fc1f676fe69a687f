"""A kernel's machine code, disassembled by cuobjdump or nvdisasm, and what instructions it has."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import msgspec

from lntune.backends.cuda import locate
from lntune.backends.cuda.code import Code, Kinds, count
from lntune.backends.cuda.flow import Instruction, Words

_KINDS = Kinds(
    global_load=frozenset({"LDG"}),
    global_store=frozenset({"STG"}),
    shared_load=frozenset({"LDS"}),
    shared_store=frozenset({"STS"}),
    local_load=frozenset({"LDL"}),
    local_store=frozenset({"STL"}),
    generic=frozenset({"LD", "ST"}),
    atomic=frozenset({"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS"}),
    asynchronous=frozenset({"LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG"}),
    shuffle=frozenset({"SHFL"}),
    barrier=frozenset({"BAR"}),
    mufu=frozenset({"MUFU"}),
    plain=frozenset({"E", "ENL2", "SYS"}),
    words=Words(
        branch=frozenset({"BRA"}),
        leave=frozenset({"EXIT", "RET"}),
        call=frozenset({"CALL"}),
        meet=frozenset({"BSSY"}),
        wait=frozenset({"ACQBULK"}),
    ),
    widths={"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256},
)
# cuobjdump: "        Function : name"; nvdisasm: ".text.name:".
_KERNEL = re.compile(r"^\s*(?:Function\s*:\s*(\S+)|\.text\.(\S+):)\s*$")
# "        /*0070*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;"
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?)(U?P\w+)\s+)?"
    r"([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;]*)"
)
# "BRA 0x4f0", or "BRA `(.L_x_2)" with a line ".L_x_2:" above what it leads to.
_LABEL = re.compile(r"^\s*(\.L_\w+):\s*$")
_TARGET = re.compile(r"(?:0x([0-9a-f]+)|`\((\.L_\w+)\))\s*$")


class _Listing:
    """The lines of one kernel."""

    def __init__(self) -> None:
        self._listed: list[Instruction] = []
        self._named: dict[int, str] = {}
        self._labels: dict[str, int] = {}
        self._waiting: list[str] = []

    def label(self, name: str) -> None:
        """A label of the next instruction."""
        self._waiting.append(name)

    def add(self, m: re.Match[str]) -> None:
        """An instruction; padding takes the labels before it and is not kept."""
        at, op = int(m[1], 16), m[4]
        self._labels |= dict.fromkeys(self._waiting, at)
        self._waiting.clear()
        if op == "NOP":
            return
        always = m[3] in (None, "PT", "UPT") and not m[2]
        steers = op in _KINDS.words.branch | _KINDS.words.meet
        goal = _TARGET.search(m[6].rstrip()) if steers else None
        if goal and goal[2]:
            self._named[len(self._listed)] = goal[2]
        target = int(goal[1], 16) if goal and goal[1] else None
        self._listed.append(Instruction(op, tuple(m[5].split(".")[1:]), not always, at, target))

    def instructions(self) -> list[Instruction]:
        """All of them, with targets as places."""
        for number, name in self._named.items():
            self._listed[number] = msgspec.structs.replace(
                self._listed[number], target=self._labels.get(name)
            )
        return self._listed


def parse(text: str, origin: str) -> dict[str, Code]:
    """Kernel -> counts, from the text of a disassembler. Lines that are no instruction are passed
    over.
    """
    listings: dict[str, _Listing] = {}
    current: _Listing | None = None
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            current = listings.setdefault(kernel[1] or kernel[2], _Listing())
        elif current is not None and (label := _LABEL.match(line)):
            current.label(label[1])
        elif current is not None and (m := _INSTRUCTION.match(line)):
            current.add(m)
    return {
        kernel: count(kernel, origin, True, _KINDS, listed)
        for kernel, listing in listings.items()
        if (listed := listing.instructions())
    }


def disassemble(cubin: bytes) -> tuple[dict[str, Code], str]:
    """Kernel -> counts of a cubin's machine code; empty where no disassembler could read it, with
    the reason.
    """
    reasons = []
    with tempfile.TemporaryDirectory(prefix="lntune-sass-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        for name, option in (("cuobjdump", "-sass"), ("nvdisasm", "-c")):
            tool = locate.program(name)
            if not tool:
                reasons.append(f"no {name}")
                continue
            try:
                done = subprocess.run(
                    [tool, option, str(path)],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    timeout=120,
                )
            except (OSError, subprocess.TimeoutExpired) as e:
                reasons.append(f"{name}: {e}")
                continue
            if not done.returncode and (counts := parse(done.stdout, name)):
                return counts, ""
            # An older release does not know a newer architecture.
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[0]
            reasons.append(f"{name} cannot read it: {said}")
    return {}, "; ".join(reasons)
