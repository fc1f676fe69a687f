"""lntune: layer-normalization kernels tuned for the machine they run on, as PyTorch ops.

    y = lntune.layer_norm(x, (1024,), weight, bias)     # as torch.nn.functional.layer_norm
    model = lntune.convert(model)                        # nn.LayerNorm -> lntune.LayerNorm
    rnn = lntune.LayerNormLSTM(512, 1024, num_layers=2)  # as torch.nn.LSTM

The command line (`lntune --help`) tunes, checks, compares and explains; `lntune.report` reads the
tuning logs.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lntune import report as report
    from lntune.errors import DisagreementError as DisagreementError
    from lntune.errors import LntuneError as LntuneError
    from lntune.errors import NotTunedError as NotTunedError
    from lntune.torch.agreement import choices_digest as choices_digest
    from lntune.torch.conversion import conversion as conversion
    from lntune.torch.conversion import convert as convert
    from lntune.torch.conversion import revert as revert
    from lntune.torch.explanation import explain as explain
    from lntune.torch.first_check import WrongKernelWarning as WrongKernelWarning
    from lntune.torch.layer_norm import layer_norm as layer_norm
    from lntune.torch.layer_norm import layer_norm_forward as layer_norm_forward
    from lntune.torch.layer_norm_backward import layer_norm_backward as layer_norm_backward
    from lntune.torch.lnlstm import lnlstm_step as lnlstm_step
    from lntune.torch.lstm import LayerNormLSTM as LayerNormLSTM
    from lntune.torch.lstm import LayerNormLSTMCell as LayerNormLSTMCell
    from lntune.torch.modules import LayerNorm as LayerNorm
    from lntune.torch.recording import record_cases as record_cases
    from lntune.torch.reloading import reload as reload
    from lntune.torch.reloading import strict as strict
    from lntune.torch.shipping import BundleWarning as BundleWarning
    from lntune.torch.shipping import load as load
    from lntune.torch.shipping import unload as unload
    from lntune.torch.untuned import UntunedWarning as UntunedWarning
    from lntune.torch.untuned import untuned as untuned

# Names are resolved on first use: the command line and the report must not pay for importing torch.
_HOME = {
    "BundleWarning": "lntune.torch.shipping",
    "DisagreementError": "lntune.errors",
    "LayerNorm": "lntune.torch.modules",
    "LayerNormLSTM": "lntune.torch.lstm",
    "LayerNormLSTMCell": "lntune.torch.lstm",
    "LntuneError": "lntune.errors",
    "NotTunedError": "lntune.errors",
    "UntunedWarning": "lntune.torch.untuned",
    "WrongKernelWarning": "lntune.torch.first_check",
    "choices_digest": "lntune.torch.agreement",
    "conversion": "lntune.torch.conversion",
    "convert": "lntune.torch.conversion",
    "explain": "lntune.torch.explanation",
    "layer_norm": "lntune.torch.layer_norm",
    "layer_norm_backward": "lntune.torch.layer_norm_backward",
    "layer_norm_forward": "lntune.torch.layer_norm",
    "lnlstm_step": "lntune.torch.lnlstm",
    "record_cases": "lntune.torch.recording",
    "load": "lntune.torch.shipping",
    "reload": "lntune.torch.reloading",
    "revert": "lntune.torch.conversion",
    "strict": "lntune.torch.reloading",
    "unload": "lntune.torch.shipping",
    "untuned": "lntune.torch.untuned",
}

__all__ = [
    "BundleWarning",
    "DisagreementError",
    "LayerNorm",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LntuneError",
    "NotTunedError",
    "UntunedWarning",
    "WrongKernelWarning",
    "__version__",
    "choices_digest",
    "conversion",
    "convert",
    "explain",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "lnlstm_step",
    "load",
    "record_cases",
    "reload",
    "report",
    "revert",
    "strict",
    "unload",
    "untuned",
]


def __getattr__(name: str) -> Any:
    if name == "report":
        return importlib.import_module("lntune.report")
    if name not in _HOME:
        raise AttributeError(f"module 'lntune' has no attribute {name!r}")
    # What is imported stays; a collection in the middle would walk over all of torch's objects (0.1
    # s) and find nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        value = getattr(importlib.import_module(_HOME[name]), name)
    finally:
        if collecting:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
