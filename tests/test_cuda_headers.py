"""What is declared by hand of NVIDIA's libraries (the driver, NVRTC, NVML) against their real
headers, as far as these are here.

A C++ compiler is told to assert, for every function that is called, that each parameter has the
size and kind (pointer, whole number) it has in the header, that a name is the one its current
declaration stands for (cuCtxPushCurrent is cuCtxPushCurrent_v2), and that structures and numbers
written down are the header's. Nothing is run.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lntune.backends.cuda import driver, locate, nvml, nvrtc
from lntune.system import exchange, toolchain

ALIKE = """
#include <cstddef>
#include <type_traits>
template <class A, class B> struct same_kind {  // pointers lead to anything where one is void *
  static constexpr bool value =
      sizeof(A) == sizeof(B) && std::is_pointer<A>::value == std::is_pointer<B>::value;
};
template <class A, class B> struct alike : same_kind<A, B> {};
template <class A> struct alike<A *, void *> : std::true_type {};
template <class B> struct alike<void *, B *> : std::true_type {};
template <> struct alike<void *, void *> : std::true_type {};
template <class A, class B> struct alike<A *, B *>
    : std::bool_constant<alike<std::remove_cv_t<A>, std::remove_cv_t<B>>::value> {};
template <class R, class S> struct calls_alike : std::false_type {};
template <class R, class S, class... A, class... B> struct calls_alike<R (*)(A...), S (*)(B...)> {
  template <bool count, class = void> struct each : std::false_type {};
  template <class unused> struct each<true, unused>
      : std::bool_constant<(true && ... && alike<A, B>::value)> {};
  static constexpr bool value = alike<R, S>::value && each<sizeof...(A) == sizeof...(B)>::value;
};
#define TEXT(...) #__VA_ARGS__
#define NAME(name) TEXT(name)
constexpr bool equal(const char *a, const char *b) {
  return *a == *b && (!*a || equal(a + 1, b + 1));
}
"""


def header(name: str) -> Path:
    """The folder of a header: a toolkit's, or a package's of pip; skips the test where there is
    none.
    """
    folders = [
        *(t / "include" for t in locate.toolkits()),
        *(w / "include" for w in locate.wheels()),
    ]
    include = next((folder for folder in folders if (folder / name).is_file()), None)
    if include is None:
        pytest.skip(f"{name} is not here: neither a CUDA toolkit nor a package of pip has it")
    return include


def proven(folder: Path, includes: Iterable[str], lines: Iterable[str], tmp_path: Path) -> str:
    """What the compiler says against the assertions; empty where they hold."""
    source = tmp_path / "proof.cpp"
    source.write_text("\n".join([ALIKE, *includes, *lines, ""]))
    places = [f"-I{p}" for p in (folder, *exchange.includes())]
    try:
        toolchain.run_compiler(
            ["-std=c++17", "-fsyntax-only", "-w", *places, str(source)], tmp_path / "nothing"
        )
    except Exception as e:
        return str(e)
    return ""


def launcher_calls() -> dict[str, str]:
    """launcher.c's functions of the driver: the name that is looked up -> the field of its
    structure.
    """
    text = driver.SOURCE.read_text()
    pairs = re.findall(r'FIND\((\w+), "(\w+)"\)', text) + re.findall(
        r'find\(d, &d->(\w+), "(\w+)"', text
    )
    return {name: field for field, name in pairs}


def assertions(calls: dict[str, str]) -> list[str]:
    """That each field is as the driver's function of its name, and that the header means that
    version by the plain name.
    """
    lines = []
    for name, field in calls.items():
        plain = re.sub(r"_v\d+$", "", name)
        lines.append(f'static_assert(equal(NAME({plain}), "{name}"), "{plain} is not {name}");')
        lines.append(
            f"static_assert(calls_alike<decltype(Driver::{field}), decltype(&{plain})>::value,"
            f' "{name}");'
        )
    return lines


def included() -> list[str]:
    """cuda.h and launcher.c."""
    return ["#include <cuda.h>", f'#include "{driver.SOURCE}"']


def test_the_driver_s_functions(tmp_path: Path) -> None:
    """Every function launcher.c looks up has in cuda.h the parameters and the version that
    launcher.c calls it with.
    """
    calls = launcher_calls()
    assert len(calls) == len(re.findall(r'"cu[A-Z]\w+"', driver.SOURCE.read_text())) >= 19
    assert proven(header("cuda.h"), included(), assertions(calls), tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("cuInit", "device_count"),
        ("cuDeviceGetName", "device_attribute"),
        ("cuLibraryGetKernel", "library_load"),
        ("cuCtxPushCurrent", "context_push"),
    ],
)
def test_a_wrong_declaration_shows(name: str, field: str, tmp_path: Path) -> None:
    """A function with other parameters, and a version that is no longer the current one, do not
    pass.
    """
    assert "static assertion failed" in proven(
        header("cuda.h"), included(), assertions({name: field}), tmp_path
    ).replace("static_assert", "static assertion")


def test_the_driver_s_numbers(tmp_path: Path) -> None:
    """Attributes and error codes written as numbers are those of cuda.h."""
    constants = {
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": driver._MULTIPROCESSORS,
        "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE": driver._L2,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": driver._MAJOR,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": driver._MINOR,
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": driver._SHARED,
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": 8,
        # launcher.c's `likely`
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_NOT_INITIALIZED": 3,
        "CUDA_ERROR_DEINITIALIZED": 4,
        "CUDA_ERROR_INVALID_IMAGE": 200,
        "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
        "CUDA_ERROR_INVALID_PTX": 218,
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": 222,
        "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": 701,
        "CUDA_ERROR_LAUNCH_TIMEOUT": 702,
        "CUDA_ERROR_ASSERT": 710,
        "CUDA_ERROR_HARDWARE_STACK_ERROR": 714,
        "CUDA_ERROR_ILLEGAL_INSTRUCTION": 715,
        "CUDA_ERROR_MISALIGNED_ADDRESS": 716,
        "CUDA_ERROR_INVALID_ADDRESS_SPACE": 717,
        "CUDA_ERROR_INVALID_PC": 718,
        "CUDA_ERROR_LAUNCH_FAILED": 719,
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
        "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": 906,
        "CUDA_ERROR_CAPTURED_EVENT": 907,
    }
    text = driver.SOURCE.read_text()
    assert "kernel_attribute(8," in text
    likely = text[text.index("*likely") : text.index("static void describe")]
    named = {int(number) for number in re.findall(r"case (\d+):", likely)}
    assert named == {number for name, number in constants.items() if name.startswith("CUDA_ERROR")}
    lines = [
        f'static_assert(int({name}) == {number}, "{name}");' for name, number in constants.items()
    ]
    assert proven(header("cuda.h"), ["#include <cuda.h>"], lines, tmp_path) == ""


def test_the_driver_s_structures(tmp_path: Path) -> None:
    """What launcher.c hands to cuLaunchKernelEx lies in memory as in cuda.h."""
    attribute, config = ("LaunchAttribute", "CUlaunchAttribute"), ("LaunchConfig", "CUlaunchConfig")
    fields = [
        (attribute, "id", "id"),
        (attribute, "value", "value"),
        (attribute, "value.allowed", "value.programmaticStreamSerializationAllowed"),
        (config, "grid", "gridDimX"),
        (config, "grid[2]", "gridDimZ"),
        (config, "block", "blockDimX"),
        (config, "block[2]", "blockDimZ"),
        (config, "shared", "sharedMemBytes"),
        (config, "stream", "hStream"),
        (config, "attributes", "attrs"),
        (config, "count", "numAttrs"),
    ]
    lines = [
        f"static_assert(offsetof({mine}, {a}) == offsetof({theirs}, {b}) &&"
        f' sizeof({mine}{{}}.{a}) >= sizeof({theirs}{{}}.{b}), "{b}");'
        for (mine, theirs), a, b in fields
    ]
    lines += [
        f"static_assert(sizeof({mine}) == sizeof({theirs}));"
        for mine, theirs in (attribute, config)
    ]
    number = "PROGRAMMATIC_STREAM_SERIALIZATION"
    lines.append(f"static_assert(int({number}) == int(CU_LAUNCH_ATTRIBUTE_{number}));")
    lines.append("static_assert(int(CUDA_ERROR_NOT_SUPPORTED) == 801);")  # `refuses`
    folder = header("cuda.h")
    assert proven(folder, included(), lines, tmp_path) == ""
    wrong = lines[1].replace("CUlaunchAttribute, value", "CUlaunchAttribute, id")
    assert "static assertion failed" in proven(folder, included(), [wrong], tmp_path)


def in_c(kind: Any, names: dict[type, str]) -> str:
    """A ctypes type in C++; structures have the names given."""
    if isinstance(kind, type) and issubclass(kind, ctypes._Pointer):
        return in_c(kind._type_, names) + " *"
    known = {
        ctypes.c_char_p: "char *",
        ctypes.c_void_p: "void *",
        ctypes.c_int: "int",
        ctypes.c_uint: "unsigned",
        ctypes.c_size_t: "std::size_t",
        ctypes.c_ulonglong: "unsigned long long",
    }
    return {**known, **names}[kind]


def by_ctypes(
    signatures: dict[str, tuple[Any, ...]], names: dict[type, str], answers: dict[str, str]
) -> list[str]:
    """Assertions that functions have the parameters ctypes is told, and answer with an int or what
    `answers` says.
    """
    lines = []
    for name, parameters in signatures.items():
        mine = f"{answers.get(name, 'int')} (*)({', '.join(in_c(p, names) for p in parameters)})"
        lines.append(f'static_assert(calls_alike<{mine}, decltype(&{name})>::value, "{name}");')
    return lines


def structure(kind: type[ctypes.Structure], name: str, fields: str) -> list[str]:
    """Assertions that a structure of ctypes lies in memory as one in C whose fields, in order, are
    called so.
    """
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}");']
    for (mine, *_), theirs in zip(kind._fields_, fields.split(), strict=True):
        at = getattr(kind, mine)
        lines.append(
            f"static_assert(offsetof({name}, {theirs}) == {at.offset} && sizeof({name}::{theirs})"
            f' == {at.size}, "{name}, {theirs}");'
        )
    return lines


def test_nvrtc_s_functions(tmp_path: Path) -> None:
    """Every function of NVRTC has in nvrtc.h the parameters it is called with."""
    lines = by_ctypes(nvrtc.SIGNATURES, {}, {"nvrtcGetErrorString": "char *"})
    assert proven(header("nvrtc.h"), ["#include <nvrtc.h>"], lines, tmp_path) == ""
    used = set(
        re.findall(r"library(?:\(self\.path\))?\.(nvrtc\w+)", Path(str(nvrtc.__file__)).read_text())
    )
    assert used - {"nvrtcGet"} <= set(nvrtc.SIGNATURES)


def test_nvml_s_functions_and_structures(tmp_path: Path) -> None:
    """Every function of NVML has in nvml.h the parameters it is called with, and structures and
    numbers are those of the header.
    """
    names: dict[type, str] = {
        nvml._Process: "nvmlProcessInfo_v2_t",
        nvml._Used: "nvmlProcessUtilizationSample_t",
    }
    lines = by_ctypes(nvml.SIGNATURES, names, {})
    lines += structure(
        nvml._Process, "nvmlProcessInfo_v2_t", "pid usedGpuMemory gpuInstanceId computeInstanceId"
    )
    lines += structure(
        nvml._Used, "nvmlProcessUtilizationSample_t", "pid timeStamp smUtil memUtil encUtil decUtil"
    )
    for name, number in {
        "NVML_CLOCK_SM": nvml._SM_CLOCK,
        "NVML_ERROR_NOT_FOUND": nvml._NOT_FOUND,
        "NVML_ERROR_INSUFFICIENT_SIZE": nvml._TOO_SMALL,
        "NVML_SUCCESS": 0,
    }.items():
        lines.append(f'static_assert(int({name}) == {number}, "{name}");')
    assert (
        proven(
            header("nvml.h"),
            ["#define NVML_NO_UNVERSIONED_FUNC_DEFS", "#include <nvml.h>"],
            lines,
            tmp_path,
        )
        == ""
    )
