"""How much memory can be had: what the host has, and what the control groups around this process leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvrdma.errors import CapacityError
from kvrdma.memory.procfs import ROOT, read_text


def available_memory_nbytes(root: Path = ROOT) -> int:
    """Bytes that can be had without swapping: the least of the host's and of every control group's.

    `root` is where /proc and /sys lie. Raises `CapacityError` where /proc/meminfo does not say.
    """
    return min([_host_nbytes(root), *cgroup_rooms(root)])


def huge_pages(root: Path = ROOT) -> tuple[int, int]:
    """How many huge pages are free (and not promised to anybody), and their size in bytes."""
    meminfo = _meminfo(root)
    free = meminfo.get("HugePages_Free", 0) - meminfo.get("HugePages_Rsvd", 0)
    return max(0, free), 1024 * meminfo.get("Hugepagesize", 0)


def shared_huge_pages(root: Path = ROOT) -> str:
    """The kernel's mode of transparent huge pages for shared memory: never, advise, always, or unknown."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return next((word[1:-1] for word in text.split() if word.startswith("[")), "unknown")


def cgroup_rooms(root: Path = ROOT) -> list[int]:
    """What each control group that has a limit leaves: of version 2 and of version 1, up the hierarchy.

    Of what a group uses, the files it has read count as free: the kernel drops them first. A pool's own pages
    are shared memory, which is not among them.
    """
    rooms = []
    for folder in _memory_cgroups(root):
        if (folder / "memory.current").exists():
            limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
            used, prefix = _number(folder / "memory.current"), ""
        else:
            limits = [_number(folder / "memory.limit_in_bytes")]
            used, prefix = _number(folder / "memory.usage_in_bytes"), "total_"
        known = [limit for limit in limits if limit is not None]
        if known and used is not None:
            stat = _table(folder / "memory.stat")
            files = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            rooms.append(max(0, min(known) - max(0, used - files)))
    return rooms


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """The folders of the groups that this process's memory is charged to, from its own up to the mount's.

    In a container the mount often begins at a group of its own, while /proc/self/cgroup may name the path as
    the host has it: what is not there is looked for at the next group up, and the mount itself always counts.
    """
    paths = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths["cgroup" if "memory" in controllers.split(",") else controllers or "cgroup2"] = path
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, options = after.split(" ")[0], after.split(" ")[-1].split(",")
        if kind not in paths or (kind == "cgroup" and "memory" not in options):
            continue
        begins, mounted = before.split(" ")[3:5]
        mount = root / mounted.lstrip("/")
        path = paths[kind]
        if begins != "/":
            path = path.removeprefix(begins) if path.startswith(begins) else "/"
        folder = mount / path.strip("/")
        while folder != mount:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield mount


def _host_nbytes(root: Path) -> int:
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        raise CapacityError("/proc/meminfo names no MemAvailable: Linux 3.14 or newer is needed")
    return available * 1024


def _meminfo(root: Path) -> dict[str, int]:
    return {name.rstrip(":"): value for name, value in _table(root / "proc/meminfo").items()}


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    found = {}
    for line in read_text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, and where there is no such file."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None
