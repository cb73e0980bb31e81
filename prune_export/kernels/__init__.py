"""Products of packed weights on CPUs: a format, and a kernel in C++ that is compiled at export.

Zeros are not stored, and rows are expanded in registers while they are multiplied. So a product
that waits for memory is faster the fewer bytes its weights have (ADR 0042).
"""

from prune_export.kernels.compiling import LIBRARY, compile_library, refuse_without_compiler
from prune_export.kernels.library import Library
from prune_export.kernels.packing import Packed, pack_codes, pack_floats, unpack

__all__ = [
    "LIBRARY",
    "Library",
    "Packed",
    "compile_library",
    "pack_codes",
    "pack_floats",
    "refuse_without_compiler",
    "unpack",
]
