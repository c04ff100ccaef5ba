"""What memory can be had, where it lies and in what pages: read from trees as /proc and /sys would have them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from kvrdma.errors import CapacityError
from kvrdma.memory import MemfdSlabs, slab
from kvrdma.memory.limits import available_memory_nbytes, cgroup_rooms, huge_pages, shared_huge_pages
from kvrdma.memory.numa import node_of_device, node_of_pci, nodes_with_memory, parse_list, prefer_node
from kvrdma.memory.slab import PAGE_NBYTES

GIB = 1 << 30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


def tree(root: Path, files: dict[str, str | int]) -> Path:
    """A root whose host has 100 GiB available."""
    for name, content in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {100 << 20} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2_group(
    path: str, limit: str | int, used: int, *, files: int = 0, high: str | int = "max"
) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\nfile {files}\ninactive_file {files // 2}\nactive_file {files - files // 2}",
    }


def v1_group(path: str, limit: int, used: int, *, files: int = 0) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 1\nactive_file 1\ntotal_inactive_file {files}\ntotal_active_file 0",
    }


def test_without_control_groups_it_is_what_the_host_has(tmp_path: Path) -> None:
    assert available_memory_nbytes(tree(tmp_path, {})) == 100 * GIB
    assert cgroup_rooms(tmp_path) == []
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(CapacityError, match="MemAvailable"):
        available_memory_nbytes(tmp_path)


@pytest.mark.parametrize(
    ("leaf", "parent", "available"),
    [
        ((20 * GIB, 5 * GIB), ("max", 50 * GIB), 15 * GIB),
        (("max", 5 * GIB), (40 * GIB, 10 * GIB), 30 * GIB),  # the limit is a parent's
        ((20 * GIB, 5 * GIB), (22 * GIB, 15 * GIB), 7 * GIB),  # both have one: the least
        (("max", 5 * GIB), ("max", 5 * GIB), 100 * GIB),
        ((20 * GIB, 21 * GIB), ("max", 50 * GIB), 0),
        ((1 << 50, 0), ("max", 0), 100 * GIB),  # a limit above what the host has
    ],
)
def test_version_2_up_the_hierarchy(
    tmp_path: Path, leaf: tuple[str | int, int], parent: tuple[str | int, int], available: int
) -> None:
    files = {"proc/self/cgroup": "0::/pod/engine", "proc/self/mountinfo": V2}
    files |= v2_group("pod/engine", *leaf) | v2_group("pod", *parent)
    assert available_memory_nbytes(tree(tmp_path, files)) == available


def test_version_2_counts_files_as_free_and_high_as_a_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/engine", "proc/self/mountinfo": V2}
    root = tree(tmp_path, files | v2_group("engine", 20 * GIB, 15 * GIB, files=10 * GIB))
    assert available_memory_nbytes(root) == 15 * GIB
    tree(root, v2_group("engine", 20 * GIB, 15 * GIB, files=10 * GIB, high=12 * GIB))
    assert available_memory_nbytes(root) == 7 * GIB


def test_a_container_that_sees_its_own_group_only(tmp_path: Path) -> None:
    """The mount begins at its group; /proc/self/cgroup says / or, without a name space, the host's path."""
    for number, path in enumerate(("/", "/kubepods/pod1/abc")):
        files = {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": V2, **v2_group("", 8 * GIB, 2 * GIB)}
        assert available_memory_nbytes(tree(tmp_path / str(number), files)) == 6 * GIB


@pytest.mark.parametrize(
    ("begins", "path", "folder"),
    [("/", "/docker/abc", "docker/abc"), ("/docker/abc", "/docker/abc", ""), ("/", "/", "")],
)
def test_version_1(tmp_path: Path, begins: str, path: str, folder: str) -> None:
    files = {
        "proc/self/cgroup": f"5:cpu:/elsewhere\n4:hugetlb,memory:{path}\n1:name=systemd:/\n0::/",
        "proc/self/mountinfo": "\n".join([V1_CPU, V1.format(begins)]),
    }
    files |= v1_group("", 0x7FFFFFFFFFFFF000, 60 * GIB) | v1_group(folder, 10 * GIB, 9 * GIB, files=3 * GIB)
    assert available_memory_nbytes(tree(tmp_path, files)) == 4 * GIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    """As systemd mounts them in its hybrid mode: memory may be in either."""
    files = {
        "proc/self/cgroup": "4:memory:/a\n0::/a",
        "proc/self/mountinfo": "\n".join([V1.format("/"), V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")]),
        "sys/fs/cgroup/unified/a/cgroup.procs": "",
        **v1_group("a", 10 * GIB, 1 * GIB),
    }
    assert available_memory_nbytes(tree(tmp_path, files)) == 9 * GIB


def test_a_slab_beyond_the_control_groups_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, **v2_group("", 8 << 20, 4 << 20)}
    root = tree(tmp_path, files)
    monkeypatch.setattr(slab, "available_memory_nbytes", lambda: available_memory_nbytes(root))
    source = MemfdSlabs(huge=False)
    assert source.available_nbytes() == 4 << 20
    with pytest.raises(CapacityError, match=f"{4 << 20} bytes are available"):
        source.allocate((4 << 20) + 1)
    source.release(source.allocate(4 << 20))


# -- huge pages


def test_free_huge_pages(tmp_path: Path) -> None:
    assert huge_pages(tree(tmp_path, {})) == (0, 0)
    meminfo = "MemAvailable: 1 kB\nHugePages_Total: 9\nHugePages_Free: 7\nHugePages_Rsvd: 3\nHugepagesize: 2048 kB"
    assert huge_pages(tree(tmp_path, {"proc/meminfo": meminfo})) == (4, 2 << 20)


def test_transparent_huge_pages_of_shared_memory(tmp_path: Path) -> None:
    assert shared_huge_pages(tmp_path) == "unknown"
    name = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    tree(tmp_path, {name: "always within_size [advise] never deny force"})
    assert shared_huge_pages(tmp_path) == "advise"


def test_huge_pages_that_are_gone_when_asked_for_are_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else was faster: more are promised here than any host has."""
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(slab, "huge_pages", lambda: (1 << 40, 2 << 20))
    monkeypatch.setattr(slab, "_touch", lambda array, *, may_fault: None)  # what is too large is never touched
    source = MemfdSlabs(lock=False)
    assert source._allocate_huge(1 << 50) is None
    monkeypatch.undo()
    monkeypatch.setattr(slab, "huge_pages", lambda: (0, 2 << 20))
    with caplog.at_level(logging.INFO):
        memory = source.allocate(4 << 20)
    assert source.huge_nbytes == 0
    assert [record.levelname for record in caplog.records] == ["INFO"]  # and it says once what there is
    assert "bytes a page" in caplog.text
    memory.array()[:] = 1
    source.release(memory)
    del memory
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_slab_that_would_waste_a_huge_page_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "huge_pages", lambda: (1 << 40, 1 << 30))
    source = MemfdSlabs()
    assert source._allocate_huge(PAGE_NBYTES) is None
    assert source.huge_nbytes == 0


@pytest.mark.skipif(huge_pages()[0] < 4, reason="needs 4 free huge pages: sysctl vm.nr_hugepages=4")
def test_a_slab_of_huge_pages() -> None:
    source = MemfdSlabs()
    memory = source.allocate((4 << 20) - 1)
    assert (source.huge_nbytes, memory.nbytes) == (4 << 20, 4 << 20)
    memory.array()[:] = 7
    assert memory.fd is not None
    assert os.pread(memory.fd, 3, 0) == b"\7\7\7"
    source.release(memory)


# -- NUMA


def test_lists_of_the_kernel() -> None:
    assert parse_list("0\n") == [0]
    assert parse_list("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8]
    assert parse_list("\n") == []
    with pytest.raises(ValueError, match="invalid"):
        parse_list("many")


def test_the_node_of_a_pci_device(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:3b:00.0/numa_node": 1,
            "sys/bus/pci/devices/0000:5e:00.0/numa_node": -1,  # a host that does not say
            "sys/devices/system/node/has_memory": "0-1",
        },
    )
    assert node_of_pci("0000:3B:00.0", tmp_path) == 1
    assert node_of_pci("0000:5e:00.0", tmp_path) is None
    assert node_of_pci("0000:ff:00.0", tmp_path) is None
    assert nodes_with_memory(tmp_path) == [0, 1]
    assert nodes_with_memory(tmp_path / "nowhere") == []


def test_a_cpu_is_on_no_node_of_its_own() -> None:
    assert node_of_device("cpu") is None


def test_memory_is_placed_on_a_node_that_there_is() -> None:
    """The policy is the kernel's to keep: it is read back from the mapping's line in numa_maps."""
    source = MemfdSlabs(lock=False)
    memory = source.allocate(1 << 20)
    node = nodes_with_memory()[0]
    assert prefer_node(memory.address, memory.nbytes, node)
    maps = Path("/proc/self/numa_maps").read_text().splitlines()
    (line,) = [line for line in maps if line.startswith(f"{memory.address:x} ")]
    assert line.split()[1] in {f"prefer:{node}", f"prefer={node}"}
    assert not prefer_node(memory.address, memory.nbytes, 1000)
    source.release(memory)


def test_on_one_node_nothing_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    monkeypatch.setattr(slab, "prefer_node", lambda address, nbytes, node: placed.append(node))
    for nodes, node, wanted in (([0], 0, []), ([0, 1], None, []), ([0, 1], 1, [1])):
        monkeypatch.setattr(slab, "nodes_with_memory", lambda nodes=nodes: nodes)
        placed.clear()
        source = MemfdSlabs(lock=False, node=node)
        memory = source.allocate(PAGE_NBYTES)
        assert placed == wanted
        assert np.count_nonzero(memory.array()) == 0
        source.release(memory)
