from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from galago.datasets.download import checksum, fetch, unpack
from galago.errors import UserError

CONTENT = b"published" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "there" / "set.tar.gz"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def test_a_published_file_is_fetched_once(published: Path, tmp_path: Path) -> None:
    here = fetch(published.as_uri(), MD5, tmp_path / "new" / "here")
    assert here == tmp_path / "new" / "here" / "set.tar.gz"
    assert checksum(here) == MD5
    published.unlink()
    assert fetch(published.as_uri(), MD5, here.parent) == here


def test_a_file_with_another_checksum_is_refused_and_not_kept(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the published file"):
        fetch(published.as_uri(), "0" * 32, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_half_fetched_file_is_fetched_again(published: Path, tmp_path: Path) -> None:
    half = tmp_path / "set.tar.gz"
    half.write_bytes(CONTENT[:100])
    assert checksum(fetch(published.as_uri(), MD5, tmp_path)) == MD5


def test_what_cannot_be_reached_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot download"):
        fetch((tmp_path / "missing").as_uri(), MD5, tmp_path / "here")


def archive_with(path: Path, name: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = 4
        archive.addfile(member, io.BytesIO(b"data"))
    return path


def test_an_archive_is_unpacked(tmp_path: Path) -> None:
    unpack(archive_with(tmp_path / "a.tar.gz", "folder/file.bin"), tmp_path)
    assert (tmp_path / "folder" / "file.bin").read_bytes() == b"data"


def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot unpack"):
        unpack(archive_with(tmp_path / "a.tar.gz", "../outside.bin"), tmp_path / "inside")
    assert not (tmp_path / "outside.bin").exists()


def test_a_damaged_archive_is_a_plain_error(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "a.tar.gz", "file")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError, match="cannot unpack"):
        unpack(path, tmp_path / "here")
