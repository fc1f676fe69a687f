"""What a kind of device has to know and do: everything in which kinds differ is asked here.

A backend is a folder beside this file with a `backend.py`, and a line in `BACKENDS`
(`__init__.py`). It finds its devices, compiles scheduled kernels for them, stores, loads and calls
these, and knows how time is measured there and what eager mode is called like. The models are
Triton's BaseBackend, tinygrad's files `ops_X.py` and Kernel Tuner's `backends/`.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lntune.case import Case
from lntune.check import Verdict, short
from lntune.check.short import Shortly
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log.records import Timing
from lntune.schedule import Schedule
from lntune.system.sealed import Facts
from lntune.timing import Enough, Measured

TVM = threading.RLock()
"""Held by who asks TVM for anything: its compiler is for one thread at a time."""

Call = Callable[[], Any]
Kernel = Callable[..., Any]
"""A function of tensors, and numbers, in the order of the operator's arguments."""


@dataclass(frozen=True)
class Scheduled:
    """A kernel as a schedule has made it, on the way to code.

    `module` is TVM's IRModule; `strided` says that it is for matrices whose rows may lie anywhere;
    `program` is what the backend lowered it to, where that was asked for already; one that is not
    `checked` may take its arguments on trust, where that is quicker to compile.
    """

    case: Case
    schedule: Schedule
    knobs: Any
    device: Device
    module: Any
    strided: bool = False
    program: Any = None
    checked: bool = True


class Backend(abc.ABC):
    """One kind of device."""

    name: ClassVar[str]
    """What `Device.backend` says, and the name of its folder."""
    kind: ClassVar[str]
    """Whose schedules it takes: the name of their folder, "cpu" or "gpu"."""
    torch_type: ClassVar[str]
    """PyTorch's type of the device that tensors are on."""
    suffix: ClassVar[str]
    """The ending of a stored kernel's file name."""
    builds_ahead: ClassVar[bool] = False
    """Candidates are compiled by processes of their own while others are measured, are looked at
    (kernels/candidate_facts.py) before they are, and tried in the order of what is found.
    """
    search: ClassVar[str] = "local"
    """The search that suits it, where a user asks for none."""
    checks_elsewhere: ClassVar[bool] = False
    """A check without the device (`stand_in`) takes so long that rows are shortened for it."""
    outputs_on_heap: ClassVar[bool] = False
    """Outputs come from the C library's heap, which gives pages back unless it is asked not to."""
    calls_directly: ClassVar[bool] = False
    """The price of a call from Python is part of what is measured, so it has to be a direct one."""
    node: ClassVar[bool] = False
    """Backwards are nodes of autograd's graph in C++ (torch/layer_norm_node.py)."""
    graphs: ClassVar[bool] = False
    """Time loops are captured as graphs of the device's and replayed (torch/graphs.py)."""
    aligned: ClassVar[bool] = False
    """Wide accesses want addresses that are multiples of their width."""
    inspects: ClassVar[bool] = False
    """Its code is CUDA source, of which `lntune inspect` shows the resources and traffic."""
    multi_arch: ClassVar[bool] = False
    """A stored kernel may have code for several architectures."""
    has_peers: ClassVar[bool] = False
    """Others have kernels for it that the benchmark times too (`Op.peers`)."""
    beside: ClassVar[Literal["", "cold", "warm"]] = ""
    """The cache that a final is measured with beside that of `measure`: the other one; empty where
    times say nothing.
    """
    fence: ClassVar[int]
    """Bytes of guard around the tensors of a check, see check.verify."""
    short_elements: ClassVar[int] = short.MOST_ELEMENTS
    """Elements of a matrix of the problem with most rows of a short check."""
    case_seconds: ClassVar[float]
    """What a case gets at least of a budget: some ten trials and the final, in seconds. Where there
    is less, the first cases get it and the last ones nothing.
    """
    trial_overhead: ClassVar[float | None] = None
    """Seconds that a trial takes beside building and timing; None where that is learned by doing
    it, as a check needs nothing but this machine.
    """

    # Devices.

    @abc.abstractmethod
    def targets(self) -> list[str]:
        """What `--target` may say on any machine."""

    @abc.abstractmethod
    def find(self, target: str) -> Device | None:
        """The device of a target; None where the text is none of this kind's.

        Raises:
            ToolchainError: it is a device of this machine, and none can be used.
            InputError: it is a device of this machine, and there are fewer.
        """

    def count(self) -> int:
        """Devices of this machine."""
        return 1

    def missing(self) -> str:
        """Why no device can be used here, as a sentence; empty when one can."""
        return ""

    @abc.abstractmethod
    def device_of(self, index: int) -> Device:
        """The device behind tensors on PyTorch's device number `index` of `torch_type`; -1 is the
        current one.

        Raises:
            InputError, ToolchainError: as find.
        """

    @abc.abstractmethod
    def torch_device(self, device: Device) -> str:
        """PyTorch's name of a device that is here: "cpu", "cuda:1". Starts nothing on it.

        Raises:
            InputError: it is not here, with what is.
        """

    @property
    @abc.abstractmethod
    def option(self) -> str:
        """The target that stands for this machine's device in a command: "cpu", "cuda"."""

    def last_cache(self, device: Device) -> int:
        """Bytes of the last cache before memory, 0 where that is not known."""
        return device.l2

    # Code.

    @abc.abstractmethod
    def target(self, device: Device) -> dict[str, Any]:
        """The TVM target of a device, as the dictionary that tvm.target.Target takes."""

    def widest(self, knobs: Any, case: Case) -> int | None:
        """Elements that an access to rows that lie anywhere may have; None: as many as it likes."""
        return None

    @abc.abstractmethod
    def in_memory(self, scheduled: Scheduled) -> Kernel:
        """The kernel compiled into this process without touching the disk.

        Raises:
            BuildError: it cannot be compiled.
        """

    def stand_in(self, scheduled: Scheduled) -> Kernel:
        """A function of the CPU's tensors that computes what the kernel does, without the device.

        Raises:
            BuildError: it cannot be compiled.
        """
        return self.in_memory(scheduled)

    @abc.abstractmethod
    def show(self, scheduled: Scheduled, form: str) -> str:
        """The code as text: "source" (what TVM makes: LLVM IR, CUDA C++) or "asm" (assembly).

        Raises:
            BuildError: it cannot be compiled.
        """

    def can_compile(self) -> bool:
        """Whether what `compiler` names is here, found out at no cost."""
        return True

    def ensure_compiler(self) -> None:  # noqa: B027 (nothing to do for most)
        """Complain where nothing can be compiled for these devices.

        Raises:
            ToolchainError: a compiler is missing.
        """

    @abc.abstractmethod
    def compiler(self) -> str:
        """What makes code, with its version, as people read it.

        Raises:
            ToolchainError: it is not there.
        """

    # Stored kernels.

    @abc.abstractmethod
    def store(self, scheduled: Scheduled, path: Path, archs: Sequence[str] = ()) -> Facts:
        """Compile a kernel into a new file; the answer is what is to be kept with it beside
        `tools`. `archs` are architectures to have code for in the same file beside the device's.

        Raises:
            BuildError: it cannot be compiled or stored.
        """

    @abc.abstractmethod
    def load(self, path: Path) -> Kernel:
        """The kernel of a file.

        Raises:
            DamagedError: the file is not what was written.
            BuildError, OSError: it cannot be loaded here.
        """

    def ensure_usable(self, what: str) -> None:  # noqa: B027
        """Complain where no kernel can be loaded whatever its file, before one is looked for.

        Raises:
            ToolchainError: with `what` and the reason.
        """

    @abc.abstractmethod
    def tools(self) -> Facts:
        """What a stored kernel is built with here, by name, beside TVM; nothing that is missing."""

    def same_tools(self, facts: Facts) -> bool:
        """True where a file with these facts was built by the compiler that is here after all,
        although `tools` says otherwise: it may just lie elsewhere.
        """
        return not self.tools().items() - facts.items()

    def architectures(self, path: Path) -> set[str]:
        """What a stored kernel has code for beside its device's own; nothing where a file has code
        for one only, or is damaged.
        """
        return set()

    def runtime(self) -> str:
        """A hash of the source of lntune's own code that stored kernels need; empty: none."""
        return ""

    def ensure_library(self) -> tuple[Path, ...]:
        """Compile what loads and launches kernels, if it is not there yet; the answer is its files.

        Raises:
            BuildError: it cannot be.
        """
        return ()

    def overlapping(self) -> contextlib.AbstractContextManager[None]:
        """In the block a kernel that this thread calls may begin while what was asked of the device
        before is still done, where it waits for that itself before it reads what that writes.

        Who opens it says that nothing else of what such a kernel reads was written since a call of
        this thread before the block.
        """
        return contextlib.nullcontext()

    # Measuring.

    @abc.abstractmethod
    def inputs(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """Plain random inputs of a case on the device, in as many copies as calls in turn need to
        find none in the cache that has to be cold. Contenders share them and none writes to them,
        but for sums.
        """

    @abc.abstractmethod
    def baseline(self, device: Device, case: Case, given: Mapping[str, Any]) -> Call:
        """Eager's call as a user of this device writes it, bound to named inputs."""

    def more_rows(self, case: Case, device: Device, kernel: Kernel) -> tuple[int, ...]:
        """The numbers of rows that a kernel, loaded or a stand-in, is to be checked with beside
        check.ROWS: those that reach what it does on many rows alone.
        """
        return ()

    @abc.abstractmethod
    def verify(
        self, case: Case, device: Device, kernel: Kernel, thoroughly: bool = False
    ) -> Verdict:
        """Check a kernel on the device with all rows that it takes, see check.verify; `thoroughly`
        what is to serve calls.
        """

    def verify_by_all(self, case: Case, device: Device, kernel: Kernel) -> Verdict:
        """Check a kernel that `verify` found right on one thread with all threads that it may have,
        on all rows that tell how they share them.
        """
        return self.verify(case, device, kernel)

    def verify_shortly(
        self, case: Case, device: Device, kernel: Kernel, strided: bool = False
    ) -> Shortly:
        """Check a kernel that is about to serve calls in some tens of milliseconds, see
        short.shortly; `strided` is one for matrices whose rows lie apart.

        Raises:
            MissingMemoryError: there is too little memory to tell.
        """
        more = self.more_rows(case, device, kernel)
        rows = short.rows_within(more, short.width_of(case), self.short_elements)
        return short.shortly(
            case, kernel, self.fence, self.torch_device(device), device, rows, strided
        )

    def machine(self, device: Device) -> Facts:
        """What a kernel that was found right on a device of this machine rests on beside versions
        of packages: the device's model, and its driver. Nothing where the device is not here.
        """
        return {}

    def recording(self) -> bool:
        """True while what this thread asks of a device is recorded as a graph, and not done."""
        return False

    def compare(self, case: Case, device: Device, kernel: Kernel, given: Mapping[str, Any]) -> str:
        """What is wrong with a kernel on the very inputs that it is to be timed on, empty where
        nothing is: for a device on which `verify` does not go through as many rows.
        """
        return ""

    @abc.abstractmethod
    def measure(
        self,
        contenders: Mapping[str, Sequence[Call]],
        device: Device,
        seconds: float,
        rounds: int = 5,
        seed: int = 0,
        enough: Enough | None = None,
    ) -> Measured:
        """Time contenders, each a call bound to every copy of `inputs`, interleaved, for about
        `seconds` in all; where `enough` is given, until that says so.
        """

    def inputs_beside(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """The same inputs in as many copies as `measure_beside` takes; none where `beside` is empty
        or `measure` has that cache already.
        """
        return []

    def measure_beside(
        self,
        contenders: Mapping[str, Sequence[Call]],
        case: Case,
        device: Device,
        seconds: float,
        seed: int = 0,
    ) -> dict[str, Timing]:
        """Time contenders with the cache that `beside` names, each a call bound to every copy of
        `inputs_beside`, for about `seconds` in all; nothing where that is too short.
        """
        return {}

    @abc.abstractmethod
    def copy_bandwidth(self, device: Device, seconds: float = 0.5) -> float:
        """Bytes a second, read and written, of a plain copy of data far beyond the caches; the
        median.
        """

    def fault(self, device: Device) -> str:
        """What keeps the device from working in this process, empty when it does."""
        return ""

    def give_back_memory(self, device: Device) -> None:  # noqa: B027
        """Have PyTorch keep no memory of the device for this process, which waits while another one
        works.
        """


def not_here(device: Device, expected: str) -> InputError:
    """The error of a device that is asked to work and is elsewhere."""
    remedy = "For one that is elsewhere: lntune tune --dry-run."
    got = f"{device.name} ({device.isa}), which is not here"
    return InputError(got_expected("device", got, expected, remedy))
