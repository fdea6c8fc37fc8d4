"""The control groups that this process is in, as Linux shows them: limits that containers and services run under.

Source: the Linux kernel's documentation of cgroup v1 and v2, and of `/proc/self/cgroup`.
"""

from pathlib import Path


def cgroup_folders(controller: str, root: Path) -> tuple[list[Path], list[Path]]:
    """Folders that hold this process's limits by version 2 and by version 1, its own group's and those above it."""
    v2: list[Path] = []
    v1: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            v2 += _upwards(root / "sys/fs/cgroup", path)
        elif controller in controllers.split(","):
            v1 += _upwards(root / "sys/fs/cgroup" / controllers, path)
    return v2, v1


def _upwards(top: Path, path: str) -> list[Path]:
    """The folder of a cgroup and those above it; in a container only `top` may be there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def read_text(path: Path) -> str:
    """What a file of the system says, "" where there is none."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
