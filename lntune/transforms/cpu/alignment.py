"""The alignment that a CPU kernel expects of its tensors."""

from __future__ import annotations

import json
from typing import Any


def element_aligned(func: Any) -> Any:
    """The PrimFunc with its parameters' alignment lowered to one element.

    By default TVM promises LLVM 64-byte alignment of every argument and checks nothing; a view that
    starts elsewhere then dies of an aligned vector move. Unaligned moves of aligned data cost
    nothing on any CPU of the last ten years. TVM has no call for this, so the field is set in its
    JSON form.
    """
    import tvm
    from tvm_ffi import serialization

    graph = json.loads(tvm.ir.save_json(func))
    nodes = graph["nodes"]
    params = nodes[nodes[graph["root_index"]]["data"]["params"]]["data"]
    changed = 0
    for param in params:
        kind = nodes[nodes[param]["data"]["ty"]]
        if kind["type"] == "tirx.BufferType":
            kind["data"]["data_alignment"] = 2  # the smallest element of any dtype here
            changed += 1
    if not changed:
        raise RuntimeError("the JSON form of a PrimFunc changed: no buffer parameter found in it")
    # tvm.ir.load_json does the same eight times slower
    return serialization.from_json_graph_str(json.dumps(graph))
