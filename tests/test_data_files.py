"""Files of prepared sets: their modes, disks that take no more, one process at a time."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data_identity import put
from test_data_sets import folder_files, write

from mwpb_fast.data import Config, DataError, DataWriteError, load_split, prepare
from mwpb_fast.system.files import write_atomically


def test_writing_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process's: what another thread makes meanwhile would be open to everybody."""
    monkeypatch.setattr(os, "umask", None)
    write_atomically(tmp_path / "x", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        put(tmp_path, "cats", encoded=True)
        write_atomically(tmp_path / "data" / "folder" / "other", b"x")
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data" / "folder").iterdir()}
    assert len(found) == 5
    assert set(found.values()) == {mode}


FULL = """
import resource, sys
from mwpb_fast import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_is_the_machines_fault(tmp_path: Path) -> None:
    source = write(tmp_path / "x", folder_files())
    words = ["data", "prepare", "folder", "--from", str(source), "--dir", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", FULL, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "File too large" in line
    assert "safetensors" in line
    assert not list((tmp_path / "data" / "folder").iterdir())


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "x", folder_files())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file") as caught:
        prepare("folder", source=source, dir=tmp_path / "file")
    assert not isinstance(caught.value, DataWriteError)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "data/folder")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DataWriteError, match="data/folder: Read-only file system"):
        prepare("folder", source=source, dir=tmp_path / "data")


def test_one_process_prepares_a_set_and_sweeps_what_was_left(tmp_path: Path) -> None:
    put(tmp_path, "cats")
    place = tmp_path / "data" / "folder"
    (place / ".train.safetensors.1.tmp").write_bytes(b"half")
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing this set"):
        put(tmp_path, "more")
    os.close(descriptor)
    put(tmp_path, "more")
    assert not list(place.glob(".*"))
    images = load_split(Config(name="folder", dir=str(tmp_path / "data")), "train")
    assert torch.bincount(images.labels).tolist() == [3, 4, 3]
