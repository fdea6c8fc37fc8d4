"""The one way to compile: `jit` for inner functions, `kernel` for entry points with a verified on-disk cache.

A kernel takes addresses and scalars and is called through ctypes, which lets go of the GIL. What is kept on disk is
the machine code, its bitcode and a symbol name, nothing pickled; each file carries its own sha256 and is read only from
a folder that belongs to the user alone. Whatever is in doubt is compiled again.
"""

import contextlib
import ctypes
import hashlib
import platform
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba import njit, types
from numba.core import config
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

from llmq.files import is_private, open_private, write_atomically
from llmq.store import cache_root

# nnan and ninf stay out: masks are -inf, and a NaN must stay one. So does reassoc: a result may not depend on what the
# compiler finds around a sum. For the same reason what must be equal bit for bit adds products by fma, not by + and *.
FASTMATH = {"nsz", "arcp", "contract", "afn"}
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH}
MAGIC = b"llmq-kernel-1\n"
KEPT_STAMPS = 4
STAMP = re.compile("[0-9a-f]{20}")

# Inner functions are always inlined, so that vectors never pass through a call; they need no entry point of their own.
INNER: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jit: Any = njit(nogil=True, **INNER, **OPTIONS)

# Linux on Arm: features, the word of the auxiliary vector (AT_HWCAP, AT_HWCAP2) and the bit that tell of them.
ARM_HWCAPS = (("dotprod", 16, 20), ("i8mm", 26, 13))

_CTYPES: dict[Any, Any] = {types.int64: ctypes.c_int64, types.float32: ctypes.c_float}
_compile_lock = threading.Lock()


def name_arm_features() -> None:
    """Tell Numba, before it first compiles, of byte products that LLVM may not know the processor has.

    LLVM looks an Arm processor's features up by its part number, which a virtual machine on a Mac does not show.
    """
    settings: Any = config
    if sys.platform != "linux" or platform.machine() != "aarch64" or settings.CPU_FEATURES is not None:
        return
    word = ctypes.CDLL(None).getauxval
    word.argtypes, word.restype = [ctypes.c_ulong], ctypes.c_ulong
    known = binding.get_host_cpu_features().flatten()
    settings.CPU_FEATURES = arm_features(known, {at: word(at) for _, at, _ in ARM_HWCAPS})


def arm_features(known: str, words: Mapping[int, int]) -> str:
    """LLVM's list of features with those of ARM_HWCAPS that the auxiliary vector's words tell of."""
    found = [f"+{name}" for name, at, bit in ARM_HWCAPS if words[at] >> bit & 1]
    return ",".join([known, *found] if known else found)


name_arm_features()


class CompileLog:
    """Who is told when a kernel has to be compiled, how many were, and how long that took so far (seconds)."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.listener: Callable[[str], None] | None = None

    def tell(self, name: str) -> None:
        self.count += 1
        if self.listener:
            self.listener(name)


compile_log = CompileLog()


class Kernel:
    """A compiled entry point: `address` for calls from other kernels, `__call__` for calls from Python."""

    def __init__(self, function: Callable[..., Any], signature: Any, name: str) -> None:
        self.name = name
        # Numba derives symbol names from this one; kernels of one factory must not share it.
        function.__name__ = function.__qualname__ = name
        self._function = function
        self._signature = signature
        self._library: Any = None
        self._address: int | None = None
        self._call: Any = None

    @property
    def address(self) -> int:
        if self._address is None:
            with _compile_lock:
                if self._address is None:
                    self._address = self._load() or self._compile()
        return self._address

    @property
    def is_ready(self) -> bool:
        """Whether it can be called without compiling; loads it if it is in the cache."""
        if self._address is None:
            with _compile_lock:
                if self._address is None:
                    self._address = self._load()
        return self._address is not None

    def prepare(self) -> None:
        """Compile it, or load it, now: so that no later call takes longer than its work."""
        _ = self.address

    def __call__(self, *args: Any) -> None:
        if self._call is None:
            argtypes = [_CTYPES[arg] for arg in self._signature.args]
            self._call = ctypes.CFUNCTYPE(None, *argtypes)(self.address)
        self._call(*args)

    def assembly(self) -> str:
        """The machine code as text; compiles without the cache."""
        with _compile_lock:
            return self._cfunc()._library.get_asm_str()

    def _cfunc(self) -> Any:
        cfunc: Any = CFunc(self._function, (self._signature.args, types.void), locals={}, options=dict(OPTIONS))
        cfunc.compile()
        return cfunc

    def _load(self) -> int | None:
        folder = cache_folder()
        found = read_cached(folder / f"{self.name}.o") if folder else None
        if found is None:
            return None
        symbol, objects, bitcode = found
        codegen = cpu_target.target_context.codegen()
        self._library = codegen.unserialize_library((self.name, "object", (objects, bitcode)))
        return self._library.get_pointer_to_function(symbol)

    def _compile(self) -> int:
        compile_log.tell(self.name)
        start = time.perf_counter()
        cfunc = self._cfunc()
        compile_log.seconds += time.perf_counter() - start
        self._library = cfunc._library
        folder = cache_folder()
        if folder:
            _name, _kind, (objects, bitcode) = self._library.serialize_using_object_code()
            write_cached(folder / f"{self.name}.o", cfunc.native_name, objects, bitcode)
        return cfunc.address


def kernel(*argtypes: Any, name: str = "") -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a function of addresses, sizes (int64) and float32 values; it is compiled at first use."""

    def wrap(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, types.void(*argtypes), name or function.__name__)

    return wrap


def read_cached(path: Path) -> tuple[str, bytes, bytes] | None:
    """Symbol, object code and bitcode of one cache file, or None when it is absent or not what was written."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    head = len(MAGIC) + 32
    payload = raw[head:]
    if raw[: len(MAGIC)] != MAGIC or raw[len(MAGIC) : head] != _digest(path, payload):
        return None
    n_symbol, n_object = struct.unpack_from("<IQ", payload)
    at = struct.calcsize("<IQ")
    symbol, at = payload[at : at + n_symbol].decode(), at + n_symbol
    return symbol, payload[at : at + n_object], payload[at + n_object :]


def write_cached(path: Path, symbol: str, objects: bytes, bitcode: bytes) -> None:
    """Writes a cache file; a full or read-only disk only means no cache."""
    payload = struct.pack("<IQ", len(symbol), len(objects)) + symbol.encode() + objects + bitcode
    with contextlib.suppress(OSError):
        write_atomically(path, MAGIC + _digest(path, payload) + payload)


def _digest(path: Path, payload: bytes) -> bytes:
    """Of the name too: the code of one kernel must not pass for another's."""
    return hashlib.sha256(path.name.encode() + b"\0" + payload).digest()


_folder: list[Path | None] = []


def cache_folder() -> Path | None:
    """The folder for this code, these versions and this processor; None when it is not private to the user."""
    if not _folder:
        _folder.append(_open_folder())
    return _folder[0]


def _open_folder() -> Path | None:
    root, stamp = open_private(cache_root()), source_stamp()
    folder = open_private(root / stamp) if root else None
    if root is None or folder is None:
        return None
    with contextlib.suppress(OSError):  # another process may be at it too
        _remove_old(root, stamp)
    return folder


def _remove_old(root: Path, stamp: str) -> None:
    """Keep the newest of the folders that other versions made; whatever else lies there is not ours."""
    others = [p for p in root.iterdir() if STAMP.fullmatch(p.name) and p.name != stamp and is_private(p)]
    for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-KEPT_STAMPS]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def source_stamp() -> str:
    """Names a cache folder: the kernels' sources, the compiler's versions, and the processor compiled for."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *(here.parent / "quant").rglob("*.py")]):
        digest.update(path.read_bytes())
    digest.update(repr((numba.__version__, llvmlite.__version__, codegen_target())).encode())
    return digest.hexdigest()[:20]


def codegen_target() -> tuple[str, str, str]:
    """Triple, processor name and feature string that code is generated for."""
    return cpu_target.target_context.codegen().magic_tuple()
