"""A CPU emulator for Metal kernels: the same ``.metal`` text, compiled as C++, with Metal's execution model."""

from veloxquant_kernels.emulator.build import CompilationFailed, CompilerNotFound, Mode, find_compiler
from veloxquant_kernels.emulator.run import BufferTraffic, KernelFault, LaunchReport, Session, launch, session

__all__ = [
    "BufferTraffic",
    "CompilationFailed",
    "CompilerNotFound",
    "KernelFault",
    "LaunchReport",
    "Mode",
    "Session",
    "find_compiler",
    "launch",
    "session",
]
