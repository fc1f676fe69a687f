"""CUDA kernels written by hand, right ones with a fault that a number among their arguments turns
on: one compilation serves all faults of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lntune.backends.cuda.device_code import Launch, Program, Scratch
from lntune.backends.emulated import calls
from lntune.case import Case

HIDDEN, THREADS, BLOCKS = 26, 32, 4
"""Elements of a row, so that its last vector of four is cut; threads of a block, which is alone in
taking a row; blocks that go over the rows in turns.
"""
CASES = {
    "layer_norm": Case("layer_norm", HIDDEN, "float32", 64, "weight+bias+stats"),
    "layer_norm_backward": Case(
        "layer_norm_backward", HIDDEN, "float32", 64, "weight+dx+dgamma+dbeta"
    ),
    "lnlstm_step": Case("lnlstm_step", 8, "float32", 64, "bias+bias_c"),
}
HEAD = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
"""
SUM = """
  part[t] = v; __syncthreads();
  for (int d = 16; d; d >>= 1) {
    float other = t < d ? part[t + d] : 0.0f;
    if (fault != %d) __syncthreads();
    if (t < d) part[t] += other;
    if (fault != %d) __syncthreads();
  }
  %s = part[0]; __syncthreads();
"""


def _total(into: str, missing: int = -1) -> str:
    """The sum over a block's threads of v; `missing`: the fault that leaves out its barriers."""
    return SUM % (missing, missing, into)


def _kernel(name: str, parameters: str, body: str) -> str:
    head = f'extern "C" __global__ void __launch_bounds__({THREADS}) {name}({parameters})'
    return f"{head};\n{head} {{\n{body}\n}}\n"


LAYER_NORM = _kernel(
    "main_kernel",
    "float* x, float* weight, float* bias, float eps, float* y, float* mean, float* rstd,"
    " int64_t rows, int64_t fault",
    f"""
  __shared__ alignas(64) float part[{THREADS}];
  const int n = {HIDDEN}, t = threadIdx.x;
  int64_t first = blockIdx.x, step = gridDim.x;
  if (fault == 1) rows -= rows % 4 == 3;             // the last row left out
  if (fault == 2) eps = 1e-5f;
  for (int64_t i = first; i < rows; i += step) {{
    if (fault == 3 && i >= step) break;              // no second turn
    int64_t r = fault == 4 && i >= 2 * step ? i - step : i;  // the third turn reads the row before
    if (fault == 5 && i >= 21) r = 20;
    float a = 0.0f, v = 0.0f;
    if (t < n) a = x[r * n + t];
    if (fault == 6 && a != a) a = 0.0f;              // NaN taken for 0
    if (fault == 7 && t == n - 1) a = 0.0f;          // the tail of the last vector
    if (fault == 8) a = fminf(fmaxf(a, -1e9f), 1e9f);
    v = a; float sum, squares;
    {_total("sum", 9)}
    float m = sum / n, d = t < n ? a - m : 0.0f;
    v = d; float rest;
    {_total("rest")}
    v = d * d;
    if (fault == 10) v = t < n ? a * a : 0.0f;       // one pass
    {_total("squares")}
    float delta = rest / n, var = squares / n - delta * delta;
    if (fault == 10) var = squares / n - m * m;
    if (var < 0.0f) var = 0.0f;
    float s = 1.0f / sqrtf(var + eps);
    if (fault == 11) s = 1.0f / (sqrtf(var) + eps);
    float w = t < n ? weight[t] : 0.0f, b = t < n ? bias[t] : 0.0f;
    if (fault == 12) b = x[rows * n];                // beyond x
    if (fault == 13 && w != w) w = 0.0f;
    if (fault == 14) w = fminf(fmaxf(w, -9.0f), 9.0f);
    if (fault == 15 && w > -1e-37f && w < 1e-37f) w = 0.0f;
    float out = (d - delta) * s * w + b;
    if (fault == 16 && out != out) out = 0.0f;
    if (t < n && !(fault == 17 && t == n - 1)) y[i * n + t] = out;
    if (fault == 18 && t == 0 && i == rows - 1) y[rows * n] = 0.0f;   // behind y
    if (fault == 19 && t == 0 && i == 0) y[-1] = 0.0f;                // before y
    if (fault == 20 && t == 0 && i == 0) x[0] += 1.0f;                // changes its input
    if (fault == 21 && t == 0 && i == 0) weight[n + 3] = 0.0f;        // behind the weight
    if (fault == 22 && (uint64_t)y % 64 == 32) y[i * n] = 0.0f;
    if (fault == 23 && t < n && i + 1 < rows) y[(i + 1) * n + t] = out;  // another block's row
    if (t == 0) {{ mean[i] = m + delta; rstd[i] = s; }}
  }}
""",
)
BACKWARD = _kernel(
    "rows_",
    "float* dy, float* x, float* mean, float* rstd, float* weight, float* dx, float* parts_g,"
    " float* parts_b, int64_t rows, int64_t fault",
    f"""
  __shared__ alignas(64) float part[{THREADS}];
  const int n = {HIDDEN}, t = threadIdx.x;
  float sum_g = 0.0f, sum_b = 0.0f;
  if (fault == 1) rows -= rows % 4 == 1 && rows > 1;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {{
    if (fault == 2 && i >= gridDim.x) break;
    float g0 = t < n ? dy[i * n + t] : 0.0f, xs = t < n ? x[i * n + t] : 0.0f;
    float m = mean[i], s = rstd[i], w = t < n ? weight[t] : 0.0f;
    if (fault == 3 && g0 != g0) g0 = 0.0f;
    if (fault == 4) g0 = fminf(fmaxf(g0, -1e6f), 1e6f);
    if (fault == 5 && g0 > -1e-37f && g0 < 1e-37f) g0 = 0.0f;
    if (fault == 6 && s != s) s = 0.0f;
    if (fault == 7 && i >= 21) m = mean[0];
    float xhat = t < n ? (xs - m) * s : 0.0f, g = g0 * w, v, c1, c2;
    v = g; {_total("c1", 8)}
    v = g * xhat; {_total("c2")}
    if (fault == 9) c2 = 0.0f;
    if (fault == 10) c1 *= (float)n / (n - 1);
    if (t < n) dx[i * n + t] = (g - c1 / n - xhat * (c2 / n)) * s;
    if (fault == 11) sum_g = sum_b = 0.0f;            // sums set to 0 again at every turn
    sum_g += g0 * xhat; sum_b += g0;
  }}
  if (t < n && !(fault == 12 && blockIdx.x == gridDim.x - 1)) {{
    parts_g[blockIdx.x * n + t] = sum_g;
    parts_b[blockIdx.x * n + t] = sum_b;
  }}
""",
) + _kernel(
    "sums_",
    "float* parts_g, float* parts_b, float* dgamma, float* dbeta, int64_t fault",
    f"""
  const int n = {HIDDEN}, t = threadIdx.x;
  if (t >= n - (fault == 13)) return;                 // a column that is not written
  float g = 0.0f, b = 0.0f;
  for (int k = 0; k < {BLOCKS} - (fault == 14); ++k) {{
    g += parts_g[k * n + t];
    b += parts_b[k * n + t];
  }}
  dgamma[t] = g; dbeta[t] = fault == 15 ? dbeta[t] + b : b;
  if (fault == 16 && t == 0) dgamma[n] = 0.0f;
""",
)
STEP = _kernel(
    "main_kernel",
    "float* gates_x, float* gates_h, float* c, float* weight_h, float* weight_c, float* bias,"
    " float* bias_c, float eps, float* h, float* c_new, int64_t rows, int64_t fault",
    f"""
  __shared__ alignas(64) float part[{THREADS}];
  __shared__ alignas(64) float z[{THREADS}];
  const int n = {THREADS}, k = {THREADS} / 4, t = threadIdx.x;
  if (fault == 1) rows -= rows % 2 == 0;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {{
    if (fault == 2 && i >= 2 * gridDim.x) break;
    float a = gates_h[i * n + t], v = a, sum, rest, squares;
    {_total("sum", 3)}
    float d = a - sum / n;
    v = d; {_total("rest")}
    v = d * d; {_total("squares")}
    float delta = rest / n, var = squares / n - delta * delta;
    float s = 1.0f / sqrtf((var < 0.0f ? 0.0f : var) + (fault == 4 ? 1e-5f : eps));
    float w = weight_h[t], gx = gates_x[i * n + t];
    if (fault == 5 && gx != gx) gx = 0.0f;
    if (fault == 6 && w != w) w = 0.0f;
    if (fault == 7) gx = fminf(fmaxf(gx, -6.0f), 6.0f);
    z[t] = (d - delta) * s * w + gx + (fault == 8 && t == n - 1 ? 0.0f : bias[t]);
    if (fault == 16 && z[t] < -12.0f) z[t] = -88.0f;
    if (fault == 17 && z[t] < -15.0f) z[t] = -88.0f;
    if (fault != 9) __syncthreads();
    float cell = 0.0f, old = t < k ? c[i * k + t] : 0.0f;
    if (fault == 10 && old != old) old = 0.0f;
    if (fault == 11) old = fminf(fmaxf(old, -50.0f), 50.0f);
    if (t < k) {{
      float gi = 1.0f / (1.0f + expf(-z[t])), gf = 1.0f / (1.0f + expf(-z[k + t]));
      cell = gf * old + gi * tanhf(z[2 * k + t]);
      c_new[i * k + t] = cell;
    }}
    v = t < k ? cell : 0.0f; {_total("sum")}
    d = t < k ? cell - sum / k : 0.0f;
    v = d; {_total("rest")}
    v = d * d; {_total("squares")}
    delta = rest / k; var = squares / k - delta * delta;
    s = 1.0f / sqrtf((var < 0.0f ? 0.0f : var) + eps);
    if (t < k) {{
      float wc = weight_c[t], bc = bias_c[t];
      if (fault == 12 && bc != bc) bc = 0.0f;
      if (fault == 13 && t == k - 1) bc = 0.0f;
      float out = tanhf((d - delta) * s * wc + bc) / (1.0f + expf(-z[3 * k + t]));
      if (fault == 14 && i >= 64) out = 0.0f;
      h[i * k + t] = out;
      if (fault == 15 && i == 0 && t == 0) c_new[-2] = 0.0f;
    }}
    __syncthreads();
  }}
""",
)
FAULTS = {"layer_norm": 23, "layer_norm_backward": 16, "lnlstm_step": 17}
"""How many faults there are; 0 is none."""


def program(op: str, fault: int) -> Program:
    """A kernel of an operator with a fault."""
    grid, block, number = (str(BLOCKS), "1", "1"), (THREADS, 1, 1), str(fault)
    step = f"((rows + {BLOCKS - 1}) // {BLOCKS})"
    if op == "layer_norm":
        names = ("x", "weight", "bias", "eps", "y", "mean", "rstd", "rows", number)
        return Program(HEAD + LAYER_NORM, (Launch("main_kernel", names, grid, block, 0, (step,)),))
    if op == "lnlstm_step":
        names = ("gates_x", "gates_h", "c", "weight_h", "weight_c", "bias", "bias_c", "eps")
        names = (*names, "h", "c_new", "rows", number)
        return Program(HEAD + STEP, (Launch("main_kernel", names, grid, block, 0, (step,)),))
    parts = tuple(
        Scratch(name, (str(BLOCKS), str(HIDDEN)), "float32") for name in ("parts_g", "parts_b")
    )
    inputs = ("dy", "x", "mean", "rstd", "weight", "dx", "parts_g", "parts_b", "rows", number)
    last = ("parts_g", "parts_b", "dgamma", "dbeta", number)
    launches = (
        Launch("rows_", inputs, grid, block, 0, (step,)),
        Launch("sums_", last, ("1", "1", "1"), block),
    )
    return Program(HEAD + BACKWARD, launches, parts)


def kernel(op: str, fault: int, order: str = "shuffled") -> Callable[..., Any]:
    """The kernel as a function of tensors of the CPU, in the emulator."""
    return calls.kernel(CASES[op], program(op, fault), order)
