"""A kernel's machine code, disassembled by cuobjdump or nvdisasm, and what instructions it has."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from lntune.backends.cuda import locate
from lntune.backends.cuda.code import Code, Instruction, Kinds, count

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
    widths={"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256},
)
# cuobjdump: "        Function : name"; nvdisasm: ".text.name:".
_KERNEL = re.compile(r"^\s*(?:Function\s*:\s*(\S+)|\.text\.(\S+):)\s*$")
# "        /*0070*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;"
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@(!?)(U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)"
)


def parse(text: str, origin: str) -> dict[str, Code]:
    """Kernel -> counts, from the text of a disassembler. Lines that are no instruction are passed
    over.
    """
    instructions: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            current = instructions.setdefault(kernel[1] or kernel[2], [])
        elif current is not None and (m := _INSTRUCTION.match(line)) and m[3] != "NOP":
            always = m[2] in (None, "PT", "UPT") and not m[1]
            current.append(Instruction(m[3], tuple(m[4].split(".")[1:]), not always))
    return {
        kernel: count(kernel, origin, True, _KINDS, listed)
        for kernel, listed in instructions.items()
        if listed
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
