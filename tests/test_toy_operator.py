"""An operator is added as CONTRIBUTING says, to a copy of the package: its file, a line in OPS, a
schedule and its PyTorch binding. Every command then knows it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

OPERATOR = '''
"""Rows divided by their root mean square: y[k] = x[k] / sqrt(sum_k x[k]^2 / N + eps)."""

from __future__ import annotations

from typing import Any

from lntune.case import Case
from lntune.errors import unknown
from lntune.ops.dtypes import widen
from lntune.ops.op import Arg, Op, RowSum, Tensors, Tolerance, eps_of, styled

NAME = "row_scale"


def arguments(case: Case) -> tuple[Arg, ...]:
    """x, eps, y."""
    matrix = ("rows", "hidden")
    return (
        Arg("x", "in", matrix, case.dtype),
        Arg("eps", "scalar", (), "float32"),
        Arg("y", "out", matrix, case.dtype),
    )


def define(case: Case, row_sum: RowSum) -> Any:
    """Stages: x32 (the widened input), the sum of squares, scale, y."""
    from tvm import te, tirx

    rows, hidden = te.var("rows", "int64"), tirx.IntImm("int64", case.hidden)
    x = te.placeholder((rows, hidden), case.dtype, name="x")
    eps = te.var("eps", "float32")
    n, one = (tirx.const(value, "float32") for value in (float(case.hidden), 1.0))
    x32 = te.compute((rows, hidden), lambda i, k: widen(x[i, k]), name="x32")
    (squares,) = row_sum(rows, case.hidden, (lambda i, k: x32[i, k] * x32[i, k],), "squares")
    scale = te.compute((rows,), lambda i: one / tirx.sqrt(squares(i) / n + eps), name="scale")
    y = te.compute((rows, hidden), lambda i, k: (x32[i, k] * scale[i]).astype(case.dtype), name="y")
    return te.create_prim_func([x, eps, y])


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """x of the style, and eps."""
    import torch

    x = styled(case.dtype, rows, case.hidden, style, torch.Generator().manual_seed(seed))
    return {"x": x.contiguous().to(getattr(torch, case.dtype)), "eps": eps_of(style)}


def _formula(x: Any, eps: float) -> Any:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def reference(case: Case, given: Tensors) -> dict[str, Any]:
    """y in float64."""
    return {"y": _formula(given["x"].double(), float(given["eps"]))}


def eager(case: Case, given: Tensors) -> dict[str, Any]:
    """The formula in float32, rounded once."""
    x = given["x"]
    return {"y": _formula(x.float(), float(given["eps"])).to(x.dtype)}


def baseline(case: Case, given: Tensors) -> Any:
    """The formula as a user writes it."""
    x, eps = given["x"], float(given["eps"])
    return lambda: _formula(x, eps)


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice eager's own error, and a rounding."""
    rounding = {"float32": 8 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    return Tolerance(2.0, rounding[case.dtype], of="y", least=1.0)


OP = Op(
    name=NAME,
    summary="rows divided by their root mean square",
    variants=("plain",),
    checked=(),
    arguments=arguments,
    define=define,
    inputs=inputs,
    reference=reference,
    eager=eager,
    baseline=baseline,
    bytes=lambda case: 2 * case.rows * case.hidden * case.itemsize,
    flops=lambda case: 3 * case.rows * case.hidden,
    tolerance=tolerance,
    grid=(Case(NAME, 64, "float32", 8),),
    binding="lntune.torch.row_scale",
)
'''

SCHEDULE = '''
"""All stages in one loop over rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, row_sums


@dataclass(frozen=True)
class Knobs:
    """Knobs of `one_loop`."""

    parallel: bool = knob(False, (False, True), "rows shared among the threads")


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """Steps: 1 define, 2 widen on the fly, 3 one loop over rows."""
    from tvm import s_tir

    row_sum = row_sums.staged_sum(device.vector_bytes // 4)
    sch = s_tir.Schedule(alignment.element_aligned(ops.get(case.op).define(case, row_sum)))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    sch.compute_inline(blocks.pop("x32"))
    rows = sch.merge(*[sch.get_loops(b)[0] for b in blocks.values()])
    if knobs.parallel:
        sch.parallel(rows)
    return sch.mod


SCHEDULES = (
    Schedule(
        "one_loop",
        "row_scale",
        "cpu",
        Knobs,
        default=lambda case, device: Knobs(),
        valid=lambda knobs, case, device: None,
        apply=apply,
    ),
)
'''

BINDING = '''
"""Rows divided by their root mean square, on a kernel where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lntune.case import Case
from lntune.ops.row_scale import NAME
from lntune.torch import dispatch


def row_scale(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) of a contiguous (rows, hidden) tensor."""
    rows, hidden = x.shape
    y = torch.empty_like(x)
    case = Case(NAME, hidden, str(x.dtype), rows)
    dispatch.serve(case, (x,))(x, eps, y)
    return y


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """row_scale bound to the operator's named inputs."""
    x, eps = inputs["x"], inputs["eps"]
    return lambda: row_scale(x, eps)
'''

COMMANDS: dict[str, tuple[str, ...]] = {
    "ops": ("ops",),
    "tune": ("tune", "row_scale", "--budget", "60s", "--trials", "2"),
    "check": ("check", "row_scale"),
    "bench": ("bench", "row_scale", "--time", "50ms", "--no-compile"),
    "report": ("report", "row_scale"),
}
PROGRAM = """
import json
import sys

from typer.testing import CliRunner

import lntune
from lntune import device
from lntune.cli import app
from lntune.commands.bringup import value
from lntune.tune import times

times.FINAL_SHARE = 1e-4
planned = [case.op for case in value.cases(device.current())]
printed = {}
for name, arguments in json.loads(sys.argv[1]).items():
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, f"{name}: {done.output} {done.exception!r}"
    printed[name] = json.loads(done.stdout)
print(json.dumps({"file": lntune.__file__, "planned": planned, "printed": printed}))
"""
"""What the copy's commands print, whose finals take no longer than they must, and the operators of
the cases that `lntune bringup` would tune, in order.
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the schedules, to which the operator is added."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lntune", "schedules"):
        ignored = shutil.ignore_patterns("__pycache__", "_bundled")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "lntune/ops/row_scale.py").write_text(OPERATOR.lstrip())
    (folder / "lntune/torch/row_scale.py").write_text(BINDING.lstrip())
    (folder / "schedules/cpu/row_scale.py").write_text(SCHEDULE.lstrip())
    registry = folder / "lntune/ops/__init__.py"
    last = '    "lnlstm_step_backward",\n'
    before, line, after = registry.read_text().partition(last)
    assert line == last
    registry.write_text(f'{before}{line}    "row_scale",\n{after}')
    return folder


def test_every_command_knows_a_new_operator(copy: Path) -> None:
    """The operator is listed, planned, tuned, checked, benchmarked and reported, served by its own
    schedule; nothing but the four additions was made.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=copy,
        env={
            **os.environ,
            "PYTHONPATH": str(copy),
            "LNTUNE_LOG_DIR": str(copy / "logs"),
            "LNTUNE_SHIPPED_LOGS": "0",
        },
    )
    assert done.returncode == 0, done.stderr + done.stdout
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["file"] == str(copy / "lntune/__init__.py")
    assert facts["planned"].count("row_scale") == 1 and facts["planned"][-1] == "row_scale"
    printed = facts["printed"]

    (listed,) = [op for op in printed["ops"] if op["op"] == "row_scale"]
    assert listed["summary"] == "rows divided by their root mean square"

    assert [row["op"] for row in printed["tune"]["cases"]] == ["row_scale"]
    assert printed["tune"]["statuses"].keys() == {"ok"}, printed["tune"]

    (checked,) = printed["check"]
    assert checked["case"]["op"] == "row_scale" and checked["ok"]
    assert "one_loop" in checked["schedule"]

    (record,) = printed["bench"]["records"]
    assert record["case"]["op"] == "row_scale" and record["schedule"] == "one_loop"
    assert {"eager", "tuned", "copy"} <= set(record["timings"])

    (table,) = printed["report"]
    assert [row["op"] for row in table["cases"]] == ["row_scale"]
