"""Run every GGUF file of a folder through `llmq show`, `llmq run` and `llmq quantize`: each must end well.

    python bench/hostile.py FOLDER

Ending well: exit code 0, or one line on stderr and a code from 1 to 4; no signal, no traceback, at most 20 seconds of
processor time and 4 GiB of address space, and no control character on the screen. Prints what did not, and the count.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LIMITS = ((resource.RLIMIT_CPU, 20), (resource.RLIMIT_AS, 4 << 30))


def limit() -> None:
    for what, n in LIMITS:
        resource.setrlimit(what, (n, n))


def verdict(arguments: list[str]) -> str:
    """What was wrong with this run, or nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=limit,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "still running after 60 seconds"
    said = done.stderr.decode(errors="replace")
    if done.returncode not in range(5):
        return f"exit code {done.returncode}: {said[-200:]!r}"
    if "Traceback" in said or "LLMQ_DEBUG" in said:
        return f"a bug: {said[-300:]!r}"
    if done.returncode and len(said.strip().splitlines()) != 1:
        return f"not one line: {said[-300:]!r}"
    if any(ord(c) < 32 and c != "\n" for c in said + done.stdout.decode(errors="replace")):
        return "control characters"
    return ""


def main() -> None:
    files = sorted(Path(sys.argv[1]).glob("*.gguf"))
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            commands = {
                "show": ["show", str(file)],
                "run": ["run", "-m", str(file), "-n", "4", "hello"],
                "quantize": ["quantize", str(file), "-o", str(Path(folder) / "out.gguf"), "--type", "q8_0"],
            }
            found = {name: verdict(arguments) for name, arguments in commands.items()}
            wrong = {name: what for name, what in found.items() if what}
            bad += bool(wrong)
            for name, what in wrong.items():
                print(f"{file.name}: {name}: {what}", flush=True)  # noqa: T201
            left = [path.name for path in Path(folder).iterdir() if path.name != "out.gguf"]
            assert not left, left
    print(f"{len(files) - bad} of {len(files)} files end well on show, run and quantize")  # noqa: T201
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
