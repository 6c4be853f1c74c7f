"""The house: what a wheel holds, and that the base install is all that a policy needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("agents", "env", "protos", "scheduler_hook", "service")


def tracked(*patterns):
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listing.stdout.splitlines())


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    """The files of a wheel built from what git tracks, and nothing else that lies about."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(
        ["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_source_file_under_one_package_and_nothing_else(wheel_files):
    own = {f"batchpilot/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    sources = {f"batchpilot/{name}" for name in tracked(*FOLDERS)}
    assert wheel_files == own | sources


def test_every_folder_is_a_link_in_the_package():
    for folder in FOLDERS:
        link = ROOT / "src" / "batchpilot" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_policies_import_nothing_beyond_numpy():
    code = (
        "import sys; before = set(sys.modules); import batchpilot.agents.catalog; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) <= {"batchpilot", "numpy"}


def test_the_command_explains_itself_and_refuses_what_it_does_not_know():
    command = [sys.executable, "-m", "batchpilot"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0
    assert "bench" in helped.stdout
    refused = subprocess.run([*command, "bnech"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "invalid choice: 'bnech'" in refused.stderr
