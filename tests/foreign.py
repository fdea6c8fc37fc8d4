"""Kernels generated for another processor than this one, to be read or run under emulation.

As a program: `python foreign.py TRIPLE CPU FEATURES FOLDER NAME...` writes NAME.s and NAME.o for each kernel, and the
instruction set that llmq chose. The target has to be set before llmq is imported, so this needs a process of its own.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from numba.core.codegen import AOTCodeLibrary, CPUCodegen
from numba.core.registry import cpu_target


class ForeignLibrary(AOTCodeLibrary):
    def get_pointer_to_function(self, name: str) -> int:  # noqa: ARG002
        self._ensure_finalized()
        return 0


class ForeignCodegen(CPUCodegen):
    """Numba's code generator up to machine code, of which nothing is loaded into this process."""

    _library_class = ForeignLibrary

    def __init__(self, triple: str, cpu: str, features: str) -> None:
        self._triple, self._cpu, self._tm_features = triple, cpu, features
        super().__init__("foreign")

    def _init(self, llvm_module: Any) -> None:  # noqa: ARG002
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(self._triple)
        self._tm = target.create_target_machine(
            cpu=self._cpu, features=self._tm_features, opt=3, reloc="pic", codemodel="default"
        )
        self._tm.set_asm_verbosity(True)  # notes spills
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._loopvect, self._opt_level = False, 0

    def _create_empty_module(self, name: str) -> Any:
        module = super()._create_empty_module(name)
        module.triple = self._triple
        return module

    def _get_host_cpu_name(self) -> str:
        return self._cpu

    def _add_module(self, module: Any) -> None: ...

    def set_env(self, env_name: str, env: Any) -> None: ...


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and how often a register is put aside in it or fetched back."""

    counts: Counter[str]
    spills: int
    text: str


LABEL = re.compile(r"([.\w$]+):")
BRANCH = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z|j[a-z]+)\s(?:.*\s)?([.\w$]+)$")
SPILL = re.compile(r"-byte (?:Folded )?(?:Spill|Reload)")


def innermost_loops(assembly: str) -> list[Loop]:
    """Loops that hold no other, of x86 or Arm assembly text; a loop is what a jump backwards jumps over."""
    lines, labels, spans = [], {}, []
    for raw in assembly.splitlines():
        line = re.split(r"//|##?\s|;", raw)[0].strip()
        if label := LABEL.fullmatch(line):
            labels[label[1]] = len(lines)
        elif line and not line.startswith("."):
            branch = BRANCH.match(line)
            if branch and branch[1] in labels:
                spans.append((labels[branch[1]], len(lines)))
            lines.append((line, bool(SPILL.search(raw))))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    found = []
    for first, last in inner:
        body = lines[first : last + 1]
        words = [re.sub(r"^\{vex\}\s*", "", line).split()[0].split(".")[0] for line, _ in body]
        found.append(Loop(Counter(words), sum(spilt for _, spilt in body), "\n".join(line for line, _ in body)))
    return found


def undefined(assembly: str) -> set[str]:
    """Functions that are called and not defined there."""
    defined = set(re.findall(r"^([\w.$]+):", assembly, re.MULTILINE))
    return set(re.findall(r"^\s(?:bl|callq?)\s+([\w.$]+)", assembly, re.MULTILINE)) - defined


def main() -> None:
    triple, cpu, features, folder, *names = sys.argv[1:]
    cpu_target.target_context._internal_codegen = ForeignCodegen(triple, cpu, features)
    from llmq import formats, simd
    from llmq.engine.plan import kernels
    from llmq.kernels.attention import attend_kernel
    from llmq.kernels.kv import F16_KV, Q8_0_KV

    for name in names:
        kind, _, fmt = name.partition("_")
        if kind.startswith("attend"):
            found = attend_kernel(int(kind.removeprefix("attend")), F16_KV if fmt == "f16" else Q8_0_KV)
        else:
            found = getattr(kernels(getattr(formats, fmt.upper())), kind)
        library = found._cfunc()._library
        Path(folder, f"{name}.s").write_text(library.get_asm_str())
        Path(folder, f"{name}.o").write_bytes(library.emit_native_object())
    sys.stdout.write(simd.ISA)


if __name__ == "__main__":
    main()
