"""Compile a kernel's Metal source as C++ with the system's compiler, into a cache by content hash.

The text is compiled as MLX generates it (``signature.generate``), after a prelude that defines Metal's types and
functions. Two rewritings are needed, each on its own line, and ``restore`` undoes both: C++ has no storage class shared
by the fibers of a threadgroup, so ``threadgroup T name[count];`` becomes a call that returns the group's array; and it
allows no attributes on the explicit instantiation behind the body.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from veloxquant_kernels.signature import GeneratedSource, Parameter

Mode = Literal["fast", "checked", "coverage"]

HERE = Path(__file__).parent
CACHE_VARIABLE = "VELOXBENCH_CACHE"

_COMMON = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-attributes")
_REFUSED = ("-Werror=vla", "-Werror=c++17-extensions", "-Werror=return-type", "-Werror=uninitialized")
_KERNEL_FLAGS: dict[Mode, tuple[str, ...]] = {
    "fast": ("-std=c++14", "-O2", *_REFUSED),
    # -fsanitize only inserts calls; runtime.cpp answers them, no sanitizer library is linked
    "checked": (
        "-std=c++14",
        "-O1",
        "-g1",
        *_REFUSED,
        "-fsanitize=thread,shift,bounds,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow",
    ),
    "coverage": ("-std=c++14", "-O0", "--coverage", "-DVQ_COVERAGE", *_REFUSED),
}

_THREADGROUP_DECLARATION = re.compile(r"\bthreadgroup[ ]([A-Za-z_][\w:]*)[ ](\w+)\[([^\[\];]+)\];")
_THREADGROUP_MACRO = re.compile(r"VQ_THREADGROUP\(([^,]+), (\w+), (.+)\);")
_INSTANTIATION = re.compile(r'^template \[\[host_name\("\w+"\)\]\] \[\[kernel\]\] decltype', re.MULTILINE)
_PLAIN_INSTANTIATION = re.compile(r"^template decltype\((\w+)", re.MULTILINE)


class CompilerNotFound(RuntimeError):
    """No C++ compiler on this machine, so the emulator cannot build kernels."""


class CompilationFailed(RuntimeError):
    """The compiler refused a kernel; the message is the compiler's."""


def rewrite(text: str) -> str:
    """Replace what C++ cannot express, line for line."""
    text = _INSTANTIATION.sub("template decltype", text)
    return _THREADGROUP_DECLARATION.sub(r"VQ_THREADGROUP(\1, \2, \3);", text)


def restore(text: str) -> str:
    """The inverse of :func:`rewrite`."""
    text = _PLAIN_INSTANTIATION.sub(r'template [[host_name("\1")]] [[kernel]] decltype(\1', text)
    return _THREADGROUP_MACRO.sub(r"threadgroup \1 \2[\3];", text)


def cache_directory() -> Path:
    """Where compiled kernels live: under ``VELOXBENCH_CACHE`` or the user's cache directory."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path(platformdirs.user_cache_dir("veloxbench"))) / "emulator"


@functools.cache
def find_compiler() -> tuple[str, str]:
    """The C++ compiler's path and version.

    Raises:
        CompilerNotFound: neither ``$CXX`` nor ``c++``, ``g++`` or ``clang++`` is there.
    """
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(candidate) if candidate else None
        if path:
            done = subprocess.run(
                [path, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            if done.returncode == 0:
                return path, done.stdout.splitlines()[0]
    raise CompilerNotFound("no C++ compiler found: install g++ or clang++, or set CXX")


def digest(*parts: str) -> str:
    """A name for what was made of these texts."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()[:32]


def compile_library(commands: list[list[str]], produced: Path, target: Path) -> None:
    """Run a compiler's commands, the last of which writes ``produced``, and put that in ``target``'s place.

    Raises:
        CompilationFailed: with the compiler's messages.
    """
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, cwd=produced.parent
        )
        if done.returncode != 0:
            raise CompilationFailed(f"{' '.join(command)}\n{done.stderr.strip()}")
    produced.replace(target)  # atomic: a reader sees a whole library or none


@functools.cache
def _runtime_library(directory: Path) -> Path:
    compiler, version = find_compiler()
    texts = [(HERE / name).read_text(encoding="utf-8") for name in ("runtime.cpp", "runtime.h")]
    flags = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-D_DARWIN_C_SOURCE", *_COMMON, "-fvisibility=default"]
    target = directory / f"libvqruntime-{digest(*texts, *flags, version, platform.machine())}.so"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            produced = Path(folder) / target.name
            install_name = [f"-Wl,-install_name,@rpath/{target.name}"] if platform.system() == "Darwin" else []
            source = str(HERE / "runtime.cpp")
            compile_library([[compiler, *flags, *install_name, "-shared", source, "-o", str(produced), "-ldl"]],
                     produced, target)  # fmt: skip
    return target


def _argument(parameter: Parameter, buffer: int, atomic_outputs: bool) -> str:
    kind = parameter.metal_type
    match parameter.origin:
        case "attribute" if kind == "uint3":
            return f"vq::triple(ids->{parameter.name})"
        case "attribute":
            return f"ids->{parameter.name}"
        case "output":
            return f"static_cast<{f'atomic<{kind}>' if atomic_outputs else kind}*>(buffers[{buffer}])"
    pointer = f"static_cast<const {kind}*>(buffers[{buffer}])"
    return f"*{pointer}" if parameter.is_reference else pointer


def translation_unit(generated: GeneratedSource, atomic_outputs: bool = False) -> str:
    """The C++ that is compiled: the prelude's include on the first line, MLX's text, and an entry point."""
    arguments = ", ".join(_argument(p, i, atomic_outputs) for i, p in enumerate(generated.parameters))
    return (
        '#include "metal_prelude.hpp"\n'
        + rewrite(generated.text)
        + '\nextern "C" __attribute__((visibility("default"), no_sanitize("thread"))) '
        + f"void vq_entry(void* const* buffers, const VqThreadIds* ids) {{ {generated.instance}({arguments}); }}\n"
    )


@dataclass(frozen=True)
class Module:
    """A compiled kernel: its library, the C++ it was made of, and how to call it."""

    path: Path
    source_path: Path
    entry: int
    runtime: ctypes.CDLL
    library: ctypes.CDLL


@functools.cache
def _load_runtime(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@functools.lru_cache(maxsize=4096)
def _build(text: str, mode: Mode, directory: Path) -> Module:
    compiler, version = find_compiler()
    runtime = _runtime_library(directory)
    flags = [*_KERNEL_FLAGS[mode], *_COMMON, f"-I{HERE}"]
    prelude = (HERE / "metal_prelude.hpp").read_text(encoding="utf-8")
    key = digest(text, prelude, *flags, version, runtime.name)
    target, source = directory / f"{key}.so", directory / f"{key}.cpp"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            produced, unit = Path(folder) / target.name, Path(folder) / f"{key}.o"
            temporary = Path(folder) / source.name
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(source)
            more = [] if platform.system() == "Darwin" else ["-nostdlib"]  # the process has what it calls; 4x faster
            if mode == "coverage":
                unit = directory / f"{key}.o"  # gcov looks for its notes beside the object
                more = ["--coverage"]
            link = [compiler, "-shared", str(unit), str(runtime), f"-Wl,-rpath,{directory}", "-o", str(produced), *more]
            compile_library([[compiler, *flags, "-c", str(source), "-o", str(unit)], link], produced, target)
    library = ctypes.CDLL(str(target))
    entry = ctypes.cast(library.vq_entry, ctypes.c_void_p).value
    assert entry is not None
    return Module(target, source, entry, _load_runtime(runtime), library)


def build(generated: GeneratedSource, mode: Mode, *, atomic_outputs: bool = False) -> Module:
    """Compile ``generated`` unless the cache has it, and load it.

    Raises:
        CompilerNotFound: no C++ compiler.
        CompilationFailed: the text is not valid; the compiler's messages are in the exception.
    """
    return _build(translation_unit(generated, atomic_outputs), mode, cache_directory())


def source_line(module: Module, pc_offset: int) -> int:
    """The line of the translation unit at an address of the module; 0 where ``addr2line`` is not installed."""
    tool = shutil.which("addr2line")
    if not tool or not pc_offset:
        return 0
    done = subprocess.run(
        [tool, "-i", "-e", str(module.path), hex(pc_offset)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    for location in done.stdout.splitlines():  # innermost first; the prelude's lines are not the kernel's
        name, _, line = location.rpartition(":")
        digits = line.split(" ")[0]
        if Path(name).name == module.source_path.name and digits.isdigit():
            return int(digits)
    return 0
