"""Fetching a published file, only where the user asks for it, and only as its publisher made it."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
import urllib.request
from pathlib import Path

from galago.errors import UserError

log = logging.getLogger(__name__)


def fetch(address: str, md5: str, folder: Path) -> Path:
    """Downloads a file into `folder`, unless it is already there; its name is the address's last part.

    Raises:
        UserError: the file cannot be had or written, or is not the one with this checksum.
    """
    target = folder / address.rpartition("/")[2]
    if target.exists() and checksum(target) == md5:
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    log.warning("downloading %s to %s", address, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(address, part)
        if (found := checksum(part)) != md5:
            raise UserError(f"{address} is not the published file: its MD5 is {found}, not {md5}; try again later")
        part.replace(target)
    except OSError as error:
        raise UserError(f"cannot download {address} to {folder}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(address: str, target: Path) -> None:
    with urllib.request.urlopen(address, timeout=60) as source, target.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)


def checksum(path: Path) -> str:
    """The MD5 of a file: publishers of data sets give no better one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Extracts a tar archive; a member that would land outside `folder` is refused.

    Raises:
        UserError: the archive is damaged or unsafe, or the folder cannot be written.
    """
    try:
        with tarfile.open(archive) as members:
            members.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"cannot unpack {archive}: {error}") from error
