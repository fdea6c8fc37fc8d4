"""Which instruction set code is generated for."""

import llvmlite.binding as llvm

X86 = (
    ("avx512vnni", {"+avx512vnni", "+avx512bw", "+avx512vl"}),
    ("avxvnni", {"+avxvnni", "+avx2", "+f16c", "+fma"}),
    ("avx2", {"+avx2", "+f16c", "+fma"}),
)

# A sum of byte products, signed by signed and unsigned by signed: LLVM has one instruction for it, or many.
PROBE = """
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define i32 @dot(<16 x i8> %x, <16 x i8> %y) {{
  %u = {extend} <16 x i8> %x to <16 x i32>
  %s = sext <16 x i8> %y to <16 x i32>
  %products = mul <16 x i32> %u, %s
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}}
"""


def is_arm(triple: str) -> bool:
    return triple.startswith(("aarch64", "arm64"))


def instruction_set(triple: str, name: str, features: str) -> str:
    """avx512vnni, avxvnni, avx2 or generic; on Arm i8mm (with dotprod), dotprod or neon, which every one has."""
    if is_arm(triple):
        return _arm(triple, name, features)
    have = set(features.split(","))
    return next((isa for isa, needed in X86 if needed <= have), "generic")


def _arm(triple: str, name: str, features: str) -> str:
    """LLVM does not list an Arm processor's features but knows them by its name, so it is asked for code."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2)

    def has(instruction: str, extend: str) -> bool:
        code = machine.emit_assembly(llvm.parse_assembly(PROBE.format(extend=extend)))
        return f"\t{instruction}" in code  # "sdot\tv0.4s" on Linux, "sdot.4s\tv0" on macOS

    if not has("sdot", "sext"):
        return "neon"
    return "i8mm" if has("usdot", "zext") else "dotprod"
