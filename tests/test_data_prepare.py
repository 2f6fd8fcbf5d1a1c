"""Preparing: downloads, atomic files, their verification, and messages that tell what to do."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_data_sets import PIXELS, folder_files, svhn_file, write

from mwpb_fast.data import (
    Config,
    DataError,
    DataWriteError,
    find_set,
    known_sets,
    load_split,
    prepare,
    svhn,
)
from mwpb_fast.data.download import MIRROR_VARIABLE, Download, fetch
from mwpb_fast.data.prepare import _locate

CONTENT = bytes(range(256)) * 9000


class Server(ThreadingHTTPServer):
    """Serves `files`; cuts the reply to each of the first `cuts` requests short; counts requests."""

    files: dict[str, bytes]
    cuts = 0
    ranges = True
    requests: list[tuple[str, str | None]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if self.server.cuts:
            self.server.cuts -= 1
            end = start + (len(content) - start) // 2
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.files, httpd.requests = {"/x.bin": CONTENT}, []
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def svhn_files() -> dict[str, bytes]:
    labels = np.arange(1, 11, dtype=np.uint8)[:, None]  # every class once
    pixels = PIXELS.transpose(2, 3, 1, 0)
    return {
        "train_32x32.mat": svhn_file(pixels[..., :10], labels),
        "test_32x32.mat": svhn_file(pixels[..., 4:], labels),
    }


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def item(*urls: str, content: bytes = CONTENT, filename: str = "x.bin") -> Download:
    return Download(filename, urls, hashlib.sha256(content).hexdigest(), len(content))


def test_download_and_reuse(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = fetch(item(f"{address(server)}/x.bin"), tmp_path, lambda *progress: seen.append(progress))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("x.bin", len(CONTENT), len(CONTENT))
    assert fetch(item(f"{address(server)}/x.bin"), tmp_path) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cuts, server.ranges = 1, ranges
    assert fetch(item(f"{address(server)}/x.bin"), tmp_path).read_bytes() == CONTENT
    assert server.requests[1] == ("/x.bin", f"bytes={len(CONTENT) // 2}-")


def test_a_partial_file_of_an_earlier_run_is_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:1000])
    fetch(item(f"{address(server)}/x.bin"), tmp_path)
    assert server.requests == [("/x.bin", "bytes=1000-")]
    (tmp_path / "x.bin").unlink()
    (tmp_path / "x.bin.part").write_bytes(b"wrong" * 200)  # the joined file fails its check and is fetched anew
    assert fetch(item(f"{address(server)}/x.bin"), tmp_path).read_bytes() == CONTENT


def test_mirrors_are_tried_in_turn(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/bad/x.bin"] = CONTENT[::-1]
    urls = [f"{address(server)}/{path}" for path in ("gone/x.bin", "bad/x.bin", "x.bin")]
    assert fetch(item(*urls), tmp_path).read_bytes() == CONTENT
    (tmp_path / "x.bin").unlink()
    monkeypatch.setenv(MIRROR_VARIABLE, address(server))
    server.requests.clear()
    fetch(item(*urls), tmp_path)
    assert [path for path, _ in server.requests] == ["/x.bin"]


def test_a_download_that_fails_says_so_in_one_line(server: Server, tmp_path: Path) -> None:
    server.files |= {"/bad.bin": CONTENT[::-1], "/long.bin": CONTENT * 3}
    base = address(server)
    with pytest.raises(DataError) as caught:
        fetch(
            item(f"{base}/gone.bin", f"{base}/bad.bin", f"{base}/long.bin", "http://127.0.0.1:9/x.bin"),
            tmp_path,
        )
    text = str(caught.value)
    for part in ("x.bin: download failed", "HTTP 404", "SHA-256 differs", "refused", "--data-dir"):
        assert part in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def test_prepare_downloads(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = svhn_files()
    server.files = {f"/{name}": content for name, content in files.items()}
    items = tuple(item(f"{address(server)}/{name}", content=c, filename=name) for name, c in files.items())
    monkeypatch.setitem(svhn.ARCHIVES, "svhn", (items,))
    with pytest.raises(DataError, match=r"offline is set: give train_32x32\.mat and test_32x32\.mat"):
        prepare("svhn", dir=tmp_path, offline=True)
    meta = prepare("svhn", dir=tmp_path)
    assert meta["source"]["official"]
    train = load_split(Config(name="svhn", dir=str(tmp_path)), "train")
    assert np.array_equal(train.images.numpy(), PIXELS[:10])
    server.requests.clear()
    assert prepare("svhn", dir=tmp_path, offline=True) == meta  # it is there already
    assert not server.requests


def test_a_download_that_the_disk_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "cifar-10-python.tar.gz.part")

    monkeypatch.setattr("mwpb_fast.data.download._receive", full)
    with pytest.raises(DataWriteError, match=r"\.part: No space left on device"):
        prepare("cifar10", dir=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "downloads").touch()
    with pytest.raises(DataError, match="downloads: ") as caught:
        prepare("cifar10", dir=tmp_path / "other")
    assert not isinstance(caught.value, DataWriteError)


def test_a_download_with_an_alternative(server: Server, tmp_path: Path) -> None:
    module = type("Set", (), {})
    urls = [f"{address(server)}/gone.bin", f"{address(server)}/x.bin"]
    module.ARCHIVES = {"some": tuple((item(url),) for url in urls)}  # type: ignore[attr-defined]
    path, origin = _locate(module, "some", None, tmp_path, False, None)  # type: ignore[arg-type]
    assert path.read_bytes() == CONTENT
    assert origin["official"]


def test_the_known_archives_are_well_formed() -> None:
    assert {"cifar10", "cifar100", "digits", "folder", "svhn", "tinyimagenet"} <= set(known_sets())
    count = 0
    for name in known_sets():
        for alternative in getattr(find_set(name), "ARCHIVES", {}).get(name, ()):
            for download in alternative:
                count += 1
                assert re.fullmatch("[0-9a-f]{64}", download.sha256)
                assert download.size > 10**7
                assert all(url.endswith("/" + download.filename) for url in download.urls)
    assert count >= 7


def test_unknown_sets_are_refused() -> None:
    for name in ("mnist", "cifar11", "dataset", "folder2", "../digits", "no.such.module", ""):
        with pytest.raises(DataError, match="not a known data set"):
            find_set(name)


def test_a_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from mwpb_fast.data.folder import read\n"
    write(tmp_path, {"mine/__init__.py": b"", "mine/pets.py": code.encode()})
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.pets"):  # another test's module of that name
        monkeypatch.delitem(sys.modules, name, raising=False)
    prepare("mine.pets", source=write(tmp_path / "x", folder_files()), dir=tmp_path)
    assert len(load_split(Config(name="mine.pets", dir=str(tmp_path)), "test")) == 9
    assert (tmp_path / "pets" / "meta.json").is_file()
