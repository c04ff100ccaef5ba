"""The wheel in an environment of its own: it runs, and brings neither torch nor an engine with it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPENDENCIES = ("msgpack", "numpy", "rich", "typer", "xxhash")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, ROOT, cwd=target)
    (path,) = target.glob("*.whl")
    return path


def test_only_kvrdma_lands_in_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kvrdma"}
    assert "kvrdma/transports/tcp/transport.py" in names
    needed = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    always = {line.split(">")[0].strip() for line in needed if "extra ==" not in line}
    assert always == set(DEPENDENCIES)


@pytest.mark.timeout(600)
def test_it_runs_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    installer = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*installer, "install", "--quiet", wheel, cwd=tmp_path)  # needs pip, and an index for the dependencies
    help_ = run(home / "bin" / "kvrdma", "--help", cwd=tmp_path)
    assert "serve" in help_
    assert "bench" in help_
    run(python, "-W", "error", "-c", "import kvrdma.manager, kvrdma.server, kvrdma.transports.tcp", cwd=tmp_path)
    installed = {
        line.split("==")[0].lower() for line in run(*installer, "freeze", "--all", cwd=tmp_path).splitlines() if line
    }
    assert set(DEPENDENCIES) <= installed
    assert not {name for name in installed if name.startswith(("torch", "vllm", "nvidia", "cuda"))}
