"""What is not arithmetic: calls through an address, records in place, stack space, a pause, a prefetch."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from llmq.jit import codegen_target
from llmq.simd.vector import ADDRESS, I8, I64, call_intrinsic, literal, op, pointer


def _pause(b: Any) -> None:
    if codegen_target()[0].startswith("x86_64"):
        call_intrinsic(b, "llvm.x86.sse2.pause", ir.VoidType())


# a hint to the processor, inside a waiting loop, that nothing is happening
pause = op(_pause, types.void)


@intrinsic
def prefetch(typingctx: Any, address: Any, n: Any) -> Any:
    """A hint that `n` (a literal) bytes at an address will be read soon; any address may be given."""
    count = literal(n)
    if count is None:
        return None

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Any:
        read, near, data = (ir.Constant(ir.IntType(32), value) for value in (0, 3, 1))
        for line in range(0, count, 64):
            at = pointer(b, b.add(args[0], ir.Constant(I64, line)), I8)
            call_intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), at, read, near, data)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, n), codegen


def call(*takes: Any) -> Any:
    """An intrinsic that calls the kernel at an address with these arguments."""

    def build(b: Any, address: Any, *values: Any) -> None:
        t = ir.FunctionType(ir.VoidType(), [v.type for v in values])
        b.call(b.inttoptr(address, t.as_pointer()), values)

    return op(build, types.void, ADDRESS, *takes)


def record_at(dtype: np.dtype) -> Any:
    """An intrinsic that reads the NumPy record at an address, in place."""
    record = from_dtype(dtype)

    @intrinsic
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(record))

        return signature(record, ADDRESS), codegen

    return at


@intrinsic
def stack(typingctx: Any, n: Any) -> Any:
    """Address of `n` (a literal) bytes on the stack, aligned to 64."""
    count = literal(n)
    if count is None:
        return None

    def codegen(_context: Any, b: Any, _sig: Any, _args: Any) -> Any:
        with b.goto_entry_block():
            space = b.alloca(ir.ArrayType(I8, count))
            space.align = 64
        return b.ptrtoint(space, I64)

    return signature(ADDRESS, n), codegen
