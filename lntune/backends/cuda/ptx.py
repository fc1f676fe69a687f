"""Counts of the instructions in a kernel's PTX, which stand in for those of its machine code where
there is no disassembler.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from lntune.backends.cuda.code import Code, Kinds, count
from lntune.backends.cuda.flow import Instruction, Words

_SPACES = ("global", "shared", "local", "param", "const")
_MUFU = ("rcp", "rsqrt", "sqrt", "ex2", "lg2", "sin", "cos", "tanh", "div")
_TYPES = {f"{letter}{bits}": bits for letter in "busf" for bits in (8, 16, 32, 64)} | {
    "b128": 128,
    "bf16": 16,
    "f16x2": 32,
    "bf16x2": 32,
}
_KINDS = Kinds(
    global_load=frozenset({"ld.global"}),
    global_store=frozenset({"st.global"}),
    shared_load=frozenset({"ld.shared"}),
    shared_store=frozenset({"st.shared"}),
    local_load=frozenset({"ld.local"}),
    local_store=frozenset({"st.local"}),
    generic=frozenset({"ld", "st"}),
    atomic=frozenset({"atom", "atom.global", "atom.shared", "red", "red.global", "red.shared"}),
    asynchronous=frozenset({"cp.shared", "cp.global"}),
    shuffle=frozenset({"shfl"}),
    barrier=frozenset({"bar", "barrier"}),
    mufu=frozenset(f"{name}.float" for name in _MUFU),
    plain=frozenset({"v2", "v4", "v8"}),
    words=Words(
        branch=frozenset({"bra"}),
        leave=frozenset({"ret", "exit"}),
        call=frozenset({"call"}),
        wait=frozenset({"griddepcontrol"}),
        move=frozenset({"mov"}),
    ),
    widths=_TYPES,
)
_ACCESSES = (
    _KINDS.global_load
    | _KINDS.global_store
    | _KINDS.shared_load
    | _KINDS.shared_store
    | _KINDS.generic
    | _KINDS.shuffle
    | _KINDS.barrier
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INSTRUCTION = re.compile(
    r"(?:@(!?%\w+)\s+)?([a-z][a-z0-9_]*)((?:(?:\.|::)[A-Za-z0-9_]+)*)(?=\s|$)"
)
_REGISTER = re.compile(r"%\w+")
_LABEL = re.compile(r"^([$%\w]+):(?!:)\s*")


def _body(text: str, start: int) -> str:
    """What stands between the braces that open after `start`."""
    opened = text.find("{", start)
    depth = 0
    for brace in re.finditer(r"[{}]", text[opened:] if opened >= 0 else ""):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[opened + 1 : opened + brace.start()]
    return ""


def _instructions(body: str) -> list[Instruction]:
    """The instructions of a function; directives, labels and braces of inline assembly are passed
    over.
    """
    listed: list[Instruction] = []
    labels: dict[str, int] = {}
    leads: dict[int, str] = {}
    for statement in body.split(";"):
        text = statement.strip(" \t\r\n{}")
        while label := _LABEL.match(text):
            labels[label[1]] = len(listed)
            text = text[label.end() :].lstrip(" \t\r\n{}")
        m = _INSTRUCTION.match(text)
        if not m:
            continue
        op, modifiers = m[2], m[3].split(".")[1:]
        if op == "bra":
            leads[len(listed)] = text.split()[-1]
        spaces = [s.partition("::")[0] for s in modifiers if s.partition("::")[0] in _SPACES]
        if op in ("ld", "st", "atom", "red", "cp") and spaces:
            modifiers = [s for s in modifiers if s.partition("::")[0] not in _SPACES]
            op = f"{op}.{spaces[0]}"
        elif (
            op in _MUFU
            and modifiers
            and modifiers[-1] in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
        ):
            op = f"{op}.float"
        elif op in ("bar", "barrier") and modifiers[:1] == ["warp"]:
            op = f"{op}.warp"
        gives, takes = _registers(op, text[m.end() :])
        listed.append(
            Instruction(
                op,
                tuple(modifiers),
                m[1] is not None,
                len(listed),
                slots=_slots(op, modifiers),
                gives=gives,
                takes=takes,
            )
        )
    for number, name in leads.items():
        listed[number] = msgspec.structs.replace(listed[number], target=labels.get(name))
    return listed


def _registers(op: str, operands: str) -> tuple[frozenset[str], frozenset[str]]:
    """The registers that an instruction writes, its first operand's, and reads, all others'."""
    first = operands.partition("}" if operands.lstrip().startswith("{") else ",")[0]
    if op.startswith(("st", "red", "bra", "call", "ret", "bar")):
        first = ""  # writes none
    rest = operands[len(first) :]
    return frozenset(_REGISTER.findall(first)), frozenset(_REGISTER.findall(rest))


def _slots(op: str, modifiers: Sequence[str]) -> float:
    """The machine instructions that become of one, on average: ptxas removes moves, contracts
    floating-point operations, predicates what branches skip, and needs two or three for 64 bits.

    Fitted to the machine code that ptxas 13.0 makes of layer norm's kernels for sm_90, whose
    instructions a row they reckon within 5 % (root of the mean square).
    """
    kind = modifiers[-1] if modifiers else ""
    if op.endswith(".float"):
        return 8.0
    if op in ("mov", "cvta", "ld.param", "activemask", "ret"):
        return 0.0 if kind == "b32" else 0.2
    if op in ("bra", "setp"):
        return 2.5
    if op in _ACCESSES:
        return 1.2
    if kind in ("s64", "u64", "b64") or "wide" in modifiers:
        return 2.4
    if op == "cvt" and list(modifiers[-2:]) == ["u32", "u16"]:  # half of a widened bfloat16
        return 0.5
    return 0.8 if kind == "f32" and op != "cvt" else 1.0


def parse(text: str, reason: str) -> dict[str, Code]:
    """Kernel -> counts, from PTX; `reason` says why it is not the machine code that is read."""
    plain = _COMMENT.sub("", text)
    # The closing parenthesis ends the parameters, before which braces of alignment do not occur.
    origin = f"PTX ({reason})" if reason else "PTX"
    return {
        m[1]: count(m[1], origin, False, _KINDS, _instructions(_body(plain, m.end())))
        for m in _ENTRY.finditer(plain)
    }
