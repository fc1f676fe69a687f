"""The bundles that calls are served from, and what of them does not fit this machine."""

from __future__ import annotations

import warnings

from lntune import device
from lntune.bundle import fit, loaded
from lntune.bundle.loaded import Bundle, BundleWarning
from lntune.commands.doctor.finding import Finding
from lntune.device import Device
from lntune.words import counted


def examine() -> list[Finding]:
    """Each bundle with what it has for this machine's CPU, and those of the environment that cannot
    be used.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BundleWarning)
        loaded.forget()
        bundles = loaded.current()
    refused = [str(w.message) for w in caught if issubclass(w.category, BundleWarning)]
    findings = [_finding(bundle, device.current()) for bundle in bundles]
    remedy = f"Eager mode or the cache serve; correct {loaded.VARIABLE}, or unset it."
    findings += [Finding("bundle", "fail", reason, remedy) for reason in refused]
    return findings or [Finding("bundle", "ok", "none")]


def _finding(bundle: Bundle, here: Device) -> Finding:
    fitting = [target for _, target in bundle.targets(here)]
    kernels = [
        entry
        for target in fitting[:1]
        for entry in target.kernels
        if not fit.sums(entry, target.device, here)
    ]
    reasons = [
        f"what is for {target.device.slug} does not fit: {', '.join(why)}"
        for target, why in bundle.misfits(here)
    ]
    what = f"{bundle.folder} ({bundle.digest[:12]})"
    if not fitting:
        remedy = "Write one that has this machine's: lntune export --target cpu."
        return Finding("bundle", "warn", f"{what}: nothing fits; {'; '.join(reasons)}", remedy)
    cases = {(e.case.op, e.case.hidden, e.case.dtype, e.case.bucket) for e in kernels}
    differences = here.differences(fitting[0].device)
    on = f", tuned on {fitting[0].device.slug} ({'; '.join(differences)})" if differences else ""
    detail = f"{what}: {counted(len(kernels), 'entry', 'entries')} for"
    detail += f" {counted(len(cases), 'case')} serve{on}"
    return Finding("bundle", "ok", "; ".join([detail, *reasons]))
