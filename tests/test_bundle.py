"""Bundles: kernels for machines with neither TVM nor a compiler, and what is refused of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare_install
import msgspec
import pytest
import torch
from made_up_records import final_here
from torch.nn import functional
from typer.testing import CliRunner
from without_tvm import child

import lntune
from lntune import device
from lntune.bundle import fit, loaded, write
from lntune.bundle import manifest as manifests
from lntune.bundle.manifest import BundleError, Manifest
from lntune.case import Case
from lntune.cli import app
from lntune.commands import doctor
from lntune.commands.export import Options, export
from lntune.errors import InputError
from lntune.log import records
from lntune.torch import dispatch

CASE = Case("layer_norm", 40, "float32", 8)
HERE = device.current()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of what one case of layer norm takes on this machine, in training, too."""
    folder = tmp_path_factory.mktemp("written") / "bundle"
    assert export({HERE: [CASE]}, folder).sha256
    return folder


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(written, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No bundle serves before a test, nor after it."""
    monkeypatch.delenv(loaded.VARIABLE, raising=False)
    lntune.unload()
    yield
    lntune.unload()


def manifest_of(folder: Path) -> Manifest:
    """What a bundle says of itself."""
    return msgspec.json.decode((folder / manifests.NAME).read_bytes(), type=Manifest)


def rewritten(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Have a bundle say something else of itself, as if it had been written so."""
    (folder / manifests.NAME).write_bytes(change(manifest_of(folder)).encoded())


def for_another(folder: Path, **fields: Any) -> None:
    """Have a bundle be for another device."""

    def change(manifest: Manifest) -> Manifest:
        (target,) = manifest.targets
        other = msgspec.structs.replace(target.device, **fields)
        target = msgspec.structs.replace(target, device=other)
        return msgspec.structs.replace(manifest, targets=(target,))

    rewritten(folder, change)


def run(*arguments: str) -> Any:
    """A command of lntune."""
    return CliRunner().invoke(app, list(arguments))


SERVES = """
import sys, warnings, torch, lntune
from torch.nn import functional
from lntune.backends.cpu import runtime
from lntune.torch import layer_norm as module, layer_norm_node
warnings.filterwarnings("error", ".*no kernel.*")
if len(sys.argv) > 1:
    print(lntune.load(sys.argv[1]))
x, w = torch.randn(5, 40), torch.ones(40)
def step(norm):
    leaf, gain, bias = (t.clone().requires_grad_() for t in (x, w, w))
    y = norm(leaf, (40,), gain, bias)
    y.backward(torch.arange(200.0).view(5, 40) / 200)
    return y.detach(), leaf.grad, gain.grad, bias.grad
for ours, eager in zip(step(lntune.layer_norm), step(functional.layer_norm)):
    torch.testing.assert_close(ours, eager)
strided = torch.cat([x, x], 1)[:, :40]
ours, eager = (norm(strided, (40,), w, w) for norm in (lntune.layer_norm, functional.layer_norm))
torch.testing.assert_close(ours, eager)
lntune.layer_norm(x, (40,), w, w)
why = lntune.explain("layer_norm", 40, "float32", 8)
assert why.bundle and "found right on this machine" in str(why), why
print(module._direct.ready, runtime.has_pool(), layer_norm_node.reason_missing() or "node")
"""


@pytest.mark.parametrize("how", ["environment", "load"])
def test_it_serves_where_there_is_neither_tvm_nor_a_compiler(
    how: str, bundle: Path, tmp_path: Path
) -> None:
    """Named by LNTUNE_BUNDLE, or given to lntune.load: forward, training with autograd's node in
    C++, and rows that lie apart are served by its kernels, each checked before its first call; an
    empty cache gets no kernel, and the bundle stays as it is.
    """
    before = {p: p.stat().st_mtime_ns for p in bundle.rglob("*")}
    cache = tmp_path / "cache"
    code = SERVES if how == "load" else SERVES.replace("len(sys.argv) > 1", "False")
    given = {"LNTUNE_BUNDLE": str(bundle)} if how == "environment" else {}
    code = f"import sys; sys.argv[1:] = [{str(bundle)!r}]\n{code}"
    done = child(code, tmp_path / "site", LNTUNE_CACHE_DIR=str(cache), **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True node"
    assert not list(cache.rglob("*.so"))
    assert {p: p.stat().st_mtime_ns for p in bundle.rglob("*")} == before


@pytest.mark.exhaustive
def test_it_serves_a_plain_install(bundle: Path, tmp_path: Path) -> None:
    """In an environment that has what `pip install lntune` brings and nothing else, no compiler on
    PATH, the same calls are served.
    """
    python = bare_install.make(tmp_path / "venv")
    cache = str(tmp_path / "cache")
    done = bare_install.run(python, "-c", SERVES, str(bundle), LNTUNE_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True node"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(folder: Path) -> None:
    path = next(folder.glob("kernels/*/*"))
    path.rename(folder.parent / "elsewhere.so")
    path.symlink_to(folder.parent / "elsewhere.so")


def _linked_folder(folder: Path) -> None:
    (folder / "kernels").rename(folder.parent / "kernels")
    (folder / "kernels").symlink_to(folder.parent / "kernels")


def _named(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def names(manifest: Manifest) -> Manifest:
            file = next(iter(manifest.files.values()))
            return msgspec.structs.replace(manifest, files={**manifest.files, name: file})

        rewritten(folder, names)

    return change


def _text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / manifests.NAME
        path.write_text(change(path.read_text()))

    return changed


ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a kernel": (lambda f: _flip(next(f.glob("kernels/*/*"))), "was altered"),
    "a library": (lambda f: _flip(next(f.glob("runtime/direct*"))), "was altered"),
    "cut short": (
        lambda f: (p := next(f.glob("kernels/*/*"))).write_bytes(p.read_bytes()[:-1]),
        "was altered",
    ),
    "one missing": (lambda f: next(f.glob("runtime/*")).unlink(), "lacks runtime/"),
    "one too many": (lambda f: (f / "kernels/more.so").write_text(""), "no part of the bundle"),
    "a hidden one": (lambda f: (f / ".hidden").write_text(""), "no part of the bundle"),
    "a link": (_link, "is a link"),
    "a linked folder": (_linked_folder, "is a link"),
    "a way out": (_named("kernels/../../elsewhere.so"), "no bundle has"),
    "a whole path": (_named("/etc/passwd"), "no bundle has"),
    "another place": (_named("more/kernel.so"), "no bundle has"),
    "a name with a zero": (_named("kernels/a\0b"), "no bundle has"),
    "no JSON": (_text(lambda t: t[:-20]), "cannot be read"),
    "another field": (_text(lambda t: t.replace('"abi"', '"abl"')), "cannot be read"),
    "a file of no sum": (
        _text(lambda t: t.replace('"file": "kernels', '"file": "kernel')),
        "no file",
    ),
    "a newer lntune's": (_text(lambda t: t.replace('"schema": 1', '"schema": 9')), "newer lntune"),
    "others can write": (lambda f: f.chmod(0o777), "can be written by every user"),
    "others can write a file": (
        lambda f: next(f.glob("kernels/*/*")).chmod(0o666),
        "can be written by every user",
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_was_altered_is_refused(
    what: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of which anything is not as it was written is refused whole, with what it is: by
    lntune.load as an error; from the environment as a warning, said once, and calls are served.
    """
    change, reason = ALTERED[what]
    change(bundle)
    with pytest.raises(BundleError, match=reason):
        lntune.load(bundle)
    monkeypatch.setenv(loaded.VARIABLE, str(bundle))
    with pytest.warns(lntune.BundleWarning, match=reason) as caught:
        assert loaded.find(CASE, HERE) is None and loaded.current() == []
    assert len(caught) == 1


def test_who_is_trusted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_TRUST names folders that are used whoever can write there, bundles too."""
    bundle.chmod(0o777)
    monkeypatch.setenv("LNTUNE_TRUST", str(bundle.parent))
    assert lntune.load(bundle).digest


def test_the_sum_that_was_printed_pins_it(bundle: Path) -> None:
    """With its sum a bundle is loaded, with another one refused, and what is no sum is said."""
    digest = lntune.load(bundle).digest
    assert lntune.load(bundle, sha256=digest.upper()).digest == digest
    with pytest.raises(BundleError, match="another bundle"):
        lntune.load(bundle, sha256="0" * 64)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        lntune.load(bundle, sha256="abc")
    with pytest.raises(InputError, match="which is not there"):
        lntune.load(bundle / "nowhere")
    with pytest.raises(InputError, match="in which there is none"):
        lntune.load(bundle / "kernels")


def test_what_is_altered_after_it_was_loaded_serves_no_call(bundle: Path) -> None:
    """Each kernel is held against its sum once more when it is loaded; eager mode serves then, and
    says why.
    """
    lntune.load(bundle)
    for path in bundle.glob("kernels/layer_norm/*"):
        _flip(path)
    x, w = torch.randn(5, 40), torch.ones(40)
    with pytest.warns(lntune.UntunedWarning, match="eager mode serves it: .* was altered"):
        y = lntune.layer_norm(x, (40,), w, w)
    torch.testing.assert_close(y, functional.layer_norm(x, (40,), w, w))


def test_a_bundle_decides_before_the_logs(bundle: Path, log_dir: Path) -> None:
    """What is loaded serves its cases whatever was tuned since, and the logs serve again once it is
    unloaded; other cases go the usual way.
    """
    records.append(log_dir, final_here(CASE, tuned=9.0, eager=2.0))
    dispatch.reload()
    assert dispatch.choose(CASE).tier == "eager"
    ours = lntune.load(bundle)
    choice = dispatch.choose(CASE)
    assert (choice.tier, choice.bundle) == ("default", str(bundle))
    assert "decides, before the logs" in choice.steps[0]
    assert not dispatch.choose(msgspec.structs.replace(CASE, rows=600)).bundle
    lntune.unload(ours)
    assert dispatch.choose(CASE).tier == "eager"


def test_records_travel(tmp_path: Path, log_dir: Path) -> None:
    """The record that a choice rests on is in the bundle, so that the case counts as measured where
    there is no log, also in strict mode; one that left the case to eager mode holds as well.
    """
    slow = msgspec.structs.replace(CASE, rows=600)
    for case, tuned in ((CASE, 1.0), (slow, 9.0)):
        records.append(log_dir, final_here(case, tuned=tuned, eager=2.0))
    dispatch.reload()
    exported = export({HERE: [CASE, slow]}, tmp_path / "b", Options(training=False))
    assert [k.status for k in exported.kernels if k.case.rows > 500] == ["eager"]
    (log_dir / HERE.slug / "layer_norm.jsonl").unlink()
    lntune.load(tmp_path / "b")
    with lntune.strict():
        one, other = dispatch.choose(CASE), dispatch.choose(slow)
        assert one.measured and one.record is not None and one.record.median() == 1.0
        assert other.measured and other.tier == "eager" and other.bundle
        assert dispatch.kernel_for(CASE) is not None
        assert dispatch.kernel_for(slow) is None
    # a bundle's records are a log, too
    assert records.read([tmp_path / "b" / manifests.RECORDS], "layer_norm")


def test_the_same_is_written_each_time(written: Path, tmp_path: Path, own_cache: Path) -> None:
    """Written again by an empty cache, in another place, it is the same to the last bit; written
    over an earlier one it takes its place.
    """
    again = tmp_path / "again"
    again.mkdir()
    (again / manifests.NAME).write_text("{}")
    export({HERE: [CASE]}, again)
    one, two = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (written, again)
    )
    assert one == two
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert {p.stat().st_mode & 0o022 for p in again.rglob("*")} == {0}


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    """A bundle is not written over what is none, and that is found before anything is built."""
    (tmp_path / "notes.txt").write_text("mine")
    for folder, reason in ((tmp_path, "other files"), (tmp_path / "notes.txt", "a file")):
        with pytest.raises(InputError, match=reason):
            export({HERE: [CASE]}, folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_what_was_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a disk is full in the middle, the earlier bundle stays, and nothing beside it."""
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(lntune.LntuneError, match="cannot write"):
        write.folder_of(bundle, {"manifest.json": b"{}"})
    monkeypatch.undo()
    assert lntune.load(bundle).digest
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(".bundle")] == []


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "a higher level": ({"isa": "x86-64-v9"}, "its code is for x86-64-v9"),
    "another processor": ({"isa": "aarch64"}, "its code is for aarch64"),
    "more instructions": ({"features": ("avx512fp16x",)}, "which this CPU lacks"),
    "a GPU": ({"kind": "gpu", "isa": "sm_90"}, "it is for a GPU"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_does_not_fit_is_named(other: str, bundle: Path) -> None:
    """Kernels whose code this machine cannot run are left alone, with a warning that says why; so
    says lntune doctor.
    """
    fields, reason = OTHERS[other]
    for_another(bundle, **fields)
    with pytest.warns(lntune.BundleWarning, match=reason):
        lntune.load(bundle)
    assert loaded.find(CASE, HERE) is None
    (finding,) = (f for f in doctor.examine() if f.topic == "bundle")
    assert finding.status == "warn" and reason in finding.detail and finding.remedy


def test_versions_that_do_not_fit_are_named(bundle: Path) -> None:
    """A bundle for another tvm_ffi, another lntune's C or a newer glibc says which."""
    (target,) = manifest_of(bundle).targets
    assert fit.reasons(target, HERE, "0.1.0") == []
    for fields, reason in (
        ({"abi": "0.9."}, "apache-tvm-ffi 0.9"),
        ({"runtime": "another"}, "built for lntune 0.0.7"),
        ({"glibc": "9.9"}, "needs glibc 9.9"),
    ):
        (said,) = fit.reasons(msgspec.structs.replace(target, **fields), HERE, "0.0.7")
        assert reason in said


def test_a_cpu_of_the_same_instructions_is_served(bundle: Path) -> None:
    """Kernels tuned on another CPU, or with other cores, serve where their code runs; that they
    were not measured here is said, and strict mode refuses them.
    """
    for_another(bundle, name="Another CPU", cores=HERE.cores + 2)
    lntune.load(bundle)
    choice = dispatch.choose(CASE)
    assert choice.bundle and "its times are not known" in choice.steps[1]
    assert "name: 'Another CPU' there" in choice.steps[1]
    assert not choice.measured
    x, w = torch.randn(5, 40), torch.ones(40)
    with pytest.warns(lntune.UntunedWarning, match=f"served by the bundle {bundle}"):
        lntune.layer_norm(x, (40,), w, w)
    with pytest.raises(lntune.NotTunedError), lntune.strict():
        lntune.layer_norm(x, (40,), w, w)


def test_the_best_target_serves(bundle: Path) -> None:
    """Of kernels for several devices those that were tuned on this one serve, else those of most
    instructions.
    """
    (own,) = manifest_of(bundle).targets
    other = msgspec.structs.replace(own.device, name="Another CPU")
    plain = msgspec.structs.replace(own.device, isa="x86-64")
    targets = [msgspec.structs.replace(own, device=d) for d in (plain, other, own.device)]
    order = sorted(targets, key=lambda t: fit.rank(t, HERE))
    assert [t.device for t in order] == [own.device, other, plain]


def test_sums_ask_for_as_many_blocks(bundle: Path) -> None:
    """A kernel that adds to sums of each block of rows does not fit another number of cores; one
    that keeps none does.
    """
    many = msgspec.structs.replace(HERE, cores=HERE.cores + 2)
    (target,) = manifest_of(bundle).targets
    entry = target.kernels[0]
    step = msgspec.structs.replace(
        entry, case=Case("lnlstm_step_backward", 40, "float32", 8, "bias+bias_c")
    )
    assert fit.sums(entry, HERE, many) == ""
    assert "this device has" in fit.sums(step, HERE, many)
    assert fit.sums(step, HERE, HERE) == ""


def test_a_wrong_kernel_of_a_bundle_does_not_serve(bundle: Path) -> None:
    """A kernel that a bundle has for the wrong case is found by the check before its first call:
    the next choice serves, which is said, and no later process tries it again.
    """

    def swapped(manifest: Manifest) -> Manifest:
        (target,) = manifest.targets
        plain, stats, *rest = target.kernels
        wrong = msgspec.structs.replace(plain, file=rest[-1].file)
        target = msgspec.structs.replace(target, kernels=(wrong, stats, *rest))
        return msgspec.structs.replace(manifest, targets=(target,))

    rewritten(bundle, swapped)
    lntune.load(bundle)
    x, w = torch.randn(5, 40), torch.ones(40)
    with pytest.warns(lntune.WrongKernelWarning, match="the next choice serves"):
        y = lntune.layer_norm(x, (40,), w, w)
    torch.testing.assert_close(y, functional.layer_norm(x, (40,), w, w))
    assert not dispatch.choose(CASE).bundle
    lntune.load(bundle)  # as another process would
    with pytest.warns(lntune.WrongKernelWarning, match="found before"):
        assert not dispatch.choose(CASE).bundle


def test_the_command(tmp_path: Path, log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lntune export --all` writes what is tuned on the targets, another device of the log among
    them, and prints where, the sum and how it is used; `why` and `doctor` then say what serves.
    """
    other = msgspec.structs.replace(HERE, name="Another CPU")
    for here in (HERE, other):
        records.append(log_dir, final_here(CASE, device=here))
    folder = tmp_path / "bundle"
    words = ["--all", "--inference", "--target", f"cpu,{other.slug}", "-o", str(folder)]
    done = run("export", *words, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert {k["device"] for k in facts["kernels"]} == {HERE.name, "Another CPU"}
    assert {k["case"]["variant"] for k in facts["kernels"]} == {"weight+bias"}
    assert manifests.read(folder, facts["sha256"])[0].targets[1].device == other
    shown = run("export", *words)
    assert facts["sha256"] in shown.stdout.replace("\n", "") and "LNTUNE_BUNDLE=" in shown.stdout
    monkeypatch.setenv(loaded.VARIABLE, str(folder))
    why = run("why", "layer_norm", "--hidden", "40", "--rows", "8")
    assert "out of the bundle" in " ".join(why.stdout.split())
    (finding,) = (f for f in doctor.examine() if f.topic == "bundle")
    assert finding.status == "ok" and "1 entry for 1 case serve" in finding.detail


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-o", "b"], "an operator, or --all"),
        (["layer_norm", "--all", "-o", "b"], "--all beside layer_norm"),
        (["layer_norm"], "--output"),
        (["layer_norm", "--target", "amd-nothing", "-o", "b"], "unknown target"),
        (["--all", "-o", "b"], "got no case"),
    ],
)
def test_what_makes_no_sense_is_said(words: list[str], reason: str, tmp_path: Path) -> None:
    """Arguments that leave open what to write, or where, end with exit code 2 and a remedy."""
    done = run("export", *[str(tmp_path / w) if w == "b" else w for w in words])
    assert done.exit_code == 2 and reason in " ".join(done.output.split()), done.output
    assert not (tmp_path / "b").exists()


def test_nothing_is_written_where_a_kernel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle is whole or not there: a kernel that cannot be built is named, with exit code 1."""
    monkeypatch.setattr(
        "lntune.kernels.compiler.to_file",
        lambda *_, **__: (_ for _ in ()).throw(lntune.LntuneError("no such luck")),
    )
    sizes = ["--hidden", "41", "--dtype", "float32", "--rows", "8"]
    done = run("export", "layer_norm", *sizes, "-o", str(tmp_path / "b"))
    assert done.exit_code == 1 and "no such luck" in done.stdout
    assert not (tmp_path / "b").exists()


def test_no_warning_of_a_sound_bundle(bundle: Path) -> None:
    """A bundle that fits is loaded in silence, and says what it holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = lntune.load(bundle)
    assert HERE.name in str(held) and "kernels" in str(held)
