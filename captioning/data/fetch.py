"""Verified downloads that resume, and safe unpacking of archives.

It knows nothing of data sets: a URL, a hash and a limit go in, a file or a folder comes out, whole or not at all.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import sys
import tarfile
import time
import urllib.parse
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from captioning.io import UserError, first_line, format_bytes, temporary_name

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20  # bytes moved at a time
ATTEMPTS = 5  # failures in a row, each without CHUNK new bytes, before a URL is given up
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (15, 60)  # seconds to connect, and without a byte arriving
BUSY = (429, 500, 502, 503, 504)  # answers after which the same request may succeed
MAX_MEMBERS = 200_000  # of an archive: empty files fill a disk too
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}  # the disk's fault, not the archive's


# --------------------------------------------------------------------------------------------------
# Downloading


class DownloadError(Exception):
    """A URL did not give the file; the message says why, without the URL."""


def download_file(url: str, path: Path, known_hash: str | None, limit: int) -> None:
    """Download `url` to `path`, which appears when it is complete and its hash is right.

    What has arrived is kept beside it in `NAME.HOST.part`, from which the next call resumes: the host is in the name so
    that one mirror's bytes never continue another's.

    Args:
        known_hash: "md5:..." or "sha256:...", or None.
        limit: bytes; a server that sends more is given up.

    Raises:
        DownloadError: the file cannot be had from this URL, or its bytes are wrong (they are deleted).
        UserError: it cannot be written.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # download_datasets.py says the same in one line
    part = path.with_name(f"{path.name}.{urllib.parse.urlsplit(url).hostname}.part")

    def resume(url: str, output_file: str, _: Any) -> None:  # what pooch calls for a temporary file that it then checks
        complete(url, part, limit)
        os.replace(part, output_file)

    try:
        pooch.retrieve(url, known_hash, path.name, path.parent, downloader=resume)
    except ValueError as error:  # how pooch reports a hash that differs, after deleting the file
        raise DownloadError(f"wrong bytes ({known_hash} expected); the file was deleted") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; what has arrived is kept, run again") from error


def complete(url: str, part: Path, limit: int) -> None:
    """Request what is missing in `part` until it is all there. It survives failures, Ctrl-C and the process.

    urllib3's Retry repeats requests that fail or meet a busy server; it cannot resume a transfer that breaks off later,
    which is repeated here.

    Raises:
        DownloadError: the server refuses, sends too much, or fails too often.
    """
    import requests
    import urllib3

    retry = urllib3.Retry(
        ATTEMPTS - 1, backoff_factor=BACKOFF, status_forcelist=BUSY, raise_on_status=False,
        respect_retry_after_header=False,  # which may say hours
    )  # fmt: skip
    failures = furthest = 0
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        # A compressed transfer could neither be resumed nor compared with the file's size.
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": "flickr-captioning-download/1"})
        while True:
            try:
                return receive(session, url, part, limit)
            except urllib3.exceptions.HTTPError as error:
                failures = 1 if size_of(part) - furthest >= CHUNK else failures + 1
                furthest = size_of(part)
                reason = f"the transfer broke off at {format_bytes(furthest)} ({type(error).__name__})"
                if failures == ATTEMPTS:
                    raise DownloadError(f"{reason}, {ATTEMPTS} times; what has arrived is kept") from error
                print(f"  {reason}; trying again", file=sys.stderr)
                time.sleep(BACKOFF * 2 ** (failures - 1))


def size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def receive(session: requests.Session, url: str, part: Path, limit: int) -> None:
    """Make one request, and append what it brings to `part`.

    Raises:
        DownloadError: the server cannot be reached, refuses or sends too much.
        urllib3.exceptions.HTTPError: the transfer broke off.
    """
    import requests
    import urllib3
    from tqdm import tqdm

    have = size_of(part)
    try:
        response = session.get(url, stream=True, timeout=TIMEOUT, headers={"Range": f"bytes={have}-"} if have else {})
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:  # ValueError: a bad redirect
        raise DownloadError(f"the connection failed ({first_line(error)})") from error
    with response:
        for step in (*response.history, response):
            require_safe_url(step.url)
        if response.status_code == 416 and have:
            return  # everything had arrived already; only the renaming was missing
        if response.status_code not in (200, 206):
            raise DownloadError(f"the server answered {response.status_code} {response.reason}")
        if response.status_code == 200:  # the first request, or a server that knows no ranges
            have = 0
        length = response.raw.length_remaining
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=length and have + length, initial=have, unit="B", unit_scale=True, desc=part.name.split(".")[0],
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):  # fmt: skip
            # As they arrive, so that all of them are kept when the transfer breaks off.
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                have += len(chunk)
                if have > limit:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    if have > limit:
        part.unlink()
        raise DownloadError(f"the server sends more than {format_bytes(limit)}, the most that is expected; deleted")


def require_safe_url(url: str) -> None:
    """Raise DownloadError unless the URL is https (or this machine, as in the tests): some files have no known hash."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and parts.hostname != "127.0.0.1":
        raise DownloadError(f"{parts.scheme}://{parts.hostname} is not https")


# --------------------------------------------------------------------------------------------------
# Unpacking


class BadArchive(UserError):
    """An archive that is damaged, or holds more than it should."""


def extract_archive(archive: Path, target: Path, max_bytes: int, members: Sequence[str] | None = None) -> None:
    """Unpack the files of a zip or tar.gz into the new directory `target`, which appears complete or not at all.

    Links and devices are left out. `zipfile` and tarfile's "data" filter write nothing outside of the directory.

    Args:
        max_bytes: how many bytes may be written.
        members: patterns of the file names (without folders) to extract; None for all.

    Raises:
        BadArchive: damaged, or with too many files or bytes.
        UserError: `target` exists already or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} is there already: move it away, then run again")
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        with open_archive(archive) as opened:
            for number, (name, size, member) in enumerate(list_files(opened)):
                if number == MAX_MEMBERS:
                    raise BadArchive(f"{archive} holds more than {MAX_MEMBERS} files: refused")
                if not selected(PurePosixPath(name), members):
                    continue
                max_bytes -= size  # neither library reads more of a member than its header says
                if max_bytes < 0:
                    raise BadArchive(f"{archive} unpacks to more than it should (stopped at {name!r}): refused")
                opened.extract(member, temporary)
        os.replace(temporary, target)
    except UserError:
        raise
    except Exception as error:  # zipfile, tarfile, gzip, zlib and struct each have their own for damaged bytes
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            advice = "Free some space, or choose another --data_dir"
            raise UserError(f"cannot unpack {archive} into {target.parent}: {error}. {advice}") from error
        raise BadArchive(f"{archive} is damaged or not an archive: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class SafeTar(tarfile.TarFile):
    """A tar that refuses paths outside of the target, links that leave it, and devices."""

    extraction_filter = staticmethod(tarfile.data_filter)


def open_archive(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    with open(archive, "rb") as file:  # by content: servers send HTML pages as .zip too
        beginning = file.read(2)
    if beginning == b"PK":
        return zipfile.ZipFile(archive)
    if beginning != b"\x1f\x8b":
        raise BadArchive(f"{archive} is neither a zip nor a tar.gz file (it begins with {beginning!r})")
    return SafeTar.open(archive, "r:gz", errorlevel=2)


def list_files(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[tuple[str, int, Any]]:
    """Yield name, size and entry of each regular file."""
    if isinstance(opened, zipfile.ZipFile):
        yield from ((info.filename, info.file_size, info) for info in opened.infolist() if info.filename[-1:] != "/")
    else:
        yield from ((entry.name, entry.size, entry) for entry in opened if entry.isfile())


def selected(path: PurePosixPath, patterns: Sequence[str] | None) -> bool:
    # __MACOSX/ and ._x.jpg are macOS's copies of file attributes, not images
    if "__MACOSX" in path.parts or path.name.startswith("._"):
        return False
    return patterns is None or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
