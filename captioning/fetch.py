"""Verified downloads that resume, and safe unpacking of archives from untrusted servers.

It knows nothing of data sets: a URL, a hash and a limit go in, a file or a folder comes out, whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import gzip
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import time
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from captioning.io import UserError, first_line, format_bytes, temporary_name

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20  # bytes moved at a time
ATTEMPTS = 5  # failures in a row, each without CHUNK new bytes, before a URL is given up
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (15, 60)  # seconds to connect, and without a byte arriving
# A slower transfer than so many bytes a second, over so many seconds, is broken off.
MIN_SPEED, SPEED_WINDOW = 1000, 60.0
MAX_MEMBERS = 200_000  # of an archive: empty files fill a disk too
MAX_SKIPPED = 1 << 30  # bytes of a tar's members that are not extracted, but have to be decompressed
# Of a tar's headers, which tarfile reads whole: at most one extended header of 64 kB, and 2 kB for each member.
MAX_HEADER, HEADER_PER_MEMBER = 1 << 16, 2048
LONG_NUMBER = re.compile(rb"[0-9]{100}")  # on which tarfile's patterns take quadratic time, before Python 3.11.10
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


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
        limit: bytes; a server that announces or sends more is given up.

    Raises:
        DownloadError: the file cannot be had from this URL, or its bytes are wrong (they are deleted).
        UserError: it cannot be written.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # download_datasets.py says the same in one line
    part = path.with_name(f"{path.name}.{urllib.parse.urlsplit(url).hostname}.part")
    downloader = ResumingDownloader(part, limit, checked=known_hash is not None)
    try:
        pooch.retrieve(url, known_hash, path.name, path.parent, downloader=downloader)
    except ValueError as error:  # how pooch reports a hash that differs, after deleting the file
        encoded = f", sent as {downloader.encoding}" if downloader.encoding else ""
        raise DownloadError(f"wrong bytes ({known_hash} expected{encoded}); the file was deleted") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; what has arrived is kept, run again") from error


def require_safe_url(url: str) -> None:
    """Raise DownloadError unless the URL is https (or this machine, as in the tests): some files have no known hash."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise DownloadError(f"{parts.scheme}://{parts.hostname or ''} is not https")


def make_session() -> requests.Session:
    """Return a session that follows redirects to safe URLs only. requests honours the environment's proxies."""
    import requests

    def check_redirect(response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            target = urllib.parse.urljoin(response.url, response.headers["location"])
            require_safe_url(target)
            if response.url.startswith("https:") and not target.startswith("https:"):
                raise DownloadError("the server redirects from https to http")

    session = requests.Session()
    session.hooks["response"].append(check_redirect)
    # A compressed transfer could neither be resumed nor compared with the file's size.
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "flickr-captioning-download/1"})
    return session


class ResumingDownloader:
    """A downloader for pooch that collects a file in `part` and requests only what is missing.

    If-Range asks for the rest of the same version of the file: a server with another version sends that whole.

    Args:
        part: it survives failures, Ctrl-C and the process.
        limit: bytes; a server that announces or sends more is given up.
        checked: whether a hash is compared in the end. Without one, `part` is resumed only if the server identifies
            the version.
    """

    def __init__(self, part: Path, limit: int, checked: bool):
        self.part = part
        self.version = part.with_name(part.name + ".version")  # the server's name of the version in `part`
        self.limit = limit
        self.checked = checked
        self.encoding = ""  # the Content-Encoding of the last response, "" for none

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> bool:
        """Fetch `url` into `output_file`, pooch's temporary file, whose hash pooch compares.

        Raises:
            DownloadError: the server refuses, redirects wrongly, sends too much, or fails too often.
        """
        require_safe_url(url)
        failures, furthest = 0, self.have()
        with make_session() as session:
            while (reason := self.transfer(session, url)) is not None:
                failures = 1 if self.have() - furthest >= CHUNK else failures + 1
                furthest = max(furthest, self.have())
                if failures == ATTEMPTS:
                    kept = f"; {format_bytes(self.have())} are kept for the next run" if self.have() else ""
                    raise DownloadError(f"{reason}; given up after {ATTEMPTS} attempts{kept}")
                print(f"  {reason}; trying again", file=sys.stderr)
                time.sleep(BACKOFF * 2 ** (failures - 1))
        os.replace(self.part, output_file)
        self.version.unlink(missing_ok=True)
        return True

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)

    def transfer(self, session: requests.Session, url: str) -> str | None:
        """Make one request. Return None when the file is complete, else why it is not (worth another attempt)."""
        import requests
        import urllib3

        version = self.version.read_text("latin-1") if self.version.exists() else ""  # as HTTP encodes headers
        if not version and not self.checked:
            self.discard()
        have = self.have()
        headers = {"Range": f"bytes={have}-", **({"If-Range": version} if version else {})} if have else {}
        try:
            with session.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
                if response.status_code == 416 and have:
                    return self.judge_unsatisfiable(response, have)
                if response.status_code == 429 or response.status_code >= 500:
                    return f"the server answered {response.status_code} {response.reason}"
                if response.status_code not in (200, 206):
                    raise DownloadError(f"the server answered {response.status_code} {response.reason}")
                return self.receive(response, have, version)
        except (ValueError, requests.TooManyRedirects) as error:  # ValueError: the redirect's or proxy's URL is none
            raise DownloadError(f"a bad redirect or proxy address: {first_line(error)}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            return f"the connection failed ({type(error).__name__}) after {format_bytes(self.have())}"

    def judge_unsatisfiable(self, response: requests.Response, have: int) -> str | None:
        if response.headers.get("Content-Range", "").strip() == f"bytes */{have}":
            return None  # everything had arrived already; only the renaming was missing
        self.discard()
        return "what had arrived does not fit the server's file; starting anew"

    def receive(self, response: requests.Response, have: int, version: str) -> str | None:
        from tqdm import tqdm

        self.encoding = response.headers.get("Content-Encoding", "")
        length = byte_count(response.headers.get("Content-Length", ""))
        total = None if length is None else have + length
        if response.status_code == 206:
            span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if span.split("-")[0].strip() != str(have):
                self.discard()
                return f"the server sent another range ({span or 'unnamed'}) than requested; starting anew"
            if version and file_version(response) not in ("", version):
                self.discard()
                return "the server's file has changed since the transfer began; starting anew"
            total = byte_count(whole) or total
        else:  # the first request, or the file has changed, or a server that knows no ranges sends all of it again
            total, have = length, 0
            self.discard()
        if total is not None and total > self.limit:
            raise DownloadError(f"the server announces {format_bytes(total)}, more than {format_bytes(self.limit)}")
        if not have:
            self.version.write_text(file_version(response), "latin-1")
        # urllib3 would drop the last, short chunk of a broken transfer; the size is compared below instead.
        response.raw.enforce_content_length = False
        with (
            open(self.part, "ab" if have else "wb") as file,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=self.part.name.split(".")[0],
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):  # fmt: skip
            since, start = time.monotonic(), have
            # As they arrive, to measure the speed, and never decoded: a few gzip bytes can hold gigabytes.
            while chunk := response.raw.read1(CHUNK // 4, decode_content=False):
                have += len(chunk)
                if have > self.limit:
                    break
                file.write(chunk)
                bar.update(len(chunk))
                if (seconds := time.monotonic() - since) >= SPEED_WINDOW:
                    if have - start < MIN_SPEED * seconds:
                        return f"only {format_bytes(have - start)} arrived in {seconds:.0f} seconds"
                    since, start = since + seconds, have
        if have > self.limit:
            self.discard()
            raise DownloadError(f"the server sends more than the expected {format_bytes(self.limit)} at most; deleted")
        if total is not None and have < total:
            return f"the transfer broke off at {format_bytes(have)} of {format_bytes(total)}"
        return None


def byte_count(text: str) -> int | None:
    """Return the number of bytes in a header, None for anything else, also for more digits than make sense."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def file_version(response: requests.Response) -> str:
    """Return what If-Range may hold: a strong ETag, else the date of the last change, else ""."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


# --------------------------------------------------------------------------------------------------
# Unpacking


class BadArchive(UserError):
    """An archive that is damaged or hostile."""


# What zipfile, tarfile and gzip raise over damaged bytes, encryption and unknown compressions.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, RuntimeError, ValueError)
# Names that no file can have, or that another member has taken; gzip.BadGzipFile is an OSError without a number.
BAD_NAMES = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


class Member(NamedTuple):
    name: str
    kind: str  # "file", "directory", or what is refused: "link", "device"
    entry: Any  # zipfile.ZipInfo or tarfile.TarInfo


def extract_archive(archive: Path, target: Path, max_bytes: int, members: Sequence[str] | None = None) -> None:
    """Unpack a zip or tar.gz into the new directory `target`, which appears complete or not at all.

    Args:
        max_bytes: how many bytes may be written, whatever the archive's headers say.
        members: patterns of the file names (without folders) to extract; None for all.

    Raises:
        BadArchive: damaged, or with absolute paths, `..`, links, devices, a name twice, too many files or bytes.
        UserError: `target` exists already or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} is there already: move it away, then run again")
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        left, skipped = max_bytes, 0
        seen: set[str] = set()
        with contextlib.ExitStack() as stack:
            opened = open_archive(archive, stack)
            for number, member in enumerate(list_members(opened)):
                if number == MAX_MEMBERS:
                    raise BadArchive(f"{archive} holds more than {MAX_MEMBERS} files: refused")
                path = check_member(member, archive, seen)
                if not selected(path, member, members):
                    if isinstance(member.entry, tarfile.TarInfo):
                        skipped += member.entry.size
                        require_room(MAX_SKIPPED - skipped, path, archive)
                    continue
                with open_member(opened, member) as source:
                    left -= write_member(source, temporary / path, left, archive)
        os.replace(temporary, target)
    except DAMAGE as error:
        raise BadArchive(f"{archive} is damaged or not an archive: {first_line(error)}") from error
    except OSError as error:
        if error.errno in BAD_NAMES:
            raise BadArchive(f"{archive} is damaged or not an archive: {first_line(error)}") from error
        raise UserError(
            f"cannot unpack {archive} into {target.parent}: {error}. Free some space, or choose another --data_dir"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_archive(archive: Path, stack: contextlib.ExitStack) -> zipfile.ZipFile | tarfile.TarFile:
    with open(archive, "rb") as file:  # by content: servers send HTML pages as .zip too
        beginning = file.read(2)
    if beginning == b"PK":
        return stack.enter_context(zipfile.ZipFile(archive))
    if beginning == b"\x1f\x8b":
        return stack.enter_context(
            tarfile.open(fileobj=stack.enter_context(BoundedGzip(archive)), mode="r:", errorlevel=2)
        )
    raise BadArchive(f"{archive} is neither a zip nor a tar.gz file (it begins with {beginning!r})")


class BoundedGzip(gzip.GzipFile):
    """A gzip file that bounds tarfile's reads: a header may claim to be gigabytes, and is read and parsed in one go.

    tarfile skips a member's content by `seek`, so that `read` serves headers, and the content of extracted members.
    """

    allowed = MAX_HEADER  # bytes that may still be read
    in_header = True

    def read(self, size: int | None = -1) -> bytes:
        self.allowed -= self.allowed + 1 if size is None or size < 0 else size
        if self.allowed < 0:
            raise BadArchive(f"{self.name} holds a header that is too long: refused")
        content = super().read(size)
        if self.in_header and LONG_NUMBER.search(content):
            raise BadArchive(f"{self.name} holds a header with a number of a hundred digits: refused")
        return content


def open_member(opened: zipfile.ZipFile | tarfile.TarFile, member: Member) -> IO[bytes]:
    if isinstance(opened, zipfile.ZipFile):
        return opened.open(member.entry)
    source = opened.extractfile(member.entry)
    assert source is not None  # None is for what check_member refuses
    return source


def list_members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[Member]:
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            mode = info.external_attr >> 16
            if info.filename.endswith("/"):  # ZipInfo.is_dir fails on an empty name
                kind = "directory"
            elif stat.S_ISLNK(mode):
                kind = "link"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = "file of an unusual compression"
            else:
                kind = "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "device"
            yield Member(info.filename, kind, info)
        return
    assert isinstance(opened.fileobj, BoundedGzip)
    for entry in opened:  # one pass: going back in a gzip stream means decompressing it again
        kind = "link" if entry.issym() or entry.islnk() else "device"
        kind = "file" if entry.isfile() else "directory" if entry.isdir() else kind
        kind = kind if entry.size >= 0 else "file of negative size"  # on which tarfile never ends
        opened.fileobj.in_header = False
        content_left = opened.fileobj.allowed + HEADER_PER_MEMBER
        opened.fileobj.allowed = content_left + max(0, entry.size)
        yield Member(entry.name, kind, entry)
        opened.fileobj.in_header, opened.fileobj.allowed = True, min(content_left, MAX_HEADER)


def check_member(member: Member, archive: Path, seen: set[str]) -> PurePosixPath:
    """Return the member's path inside the target; refuse what could write or point elsewhere."""
    name = member.name.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise BadArchive(f"{archive} holds {member.name!r}, which would be written outside its folder: refused")
    if member.kind not in ("file", "directory"):
        raise BadArchive(f"{archive} holds {member.name!r}, a {member.kind}: refused")
    if member.kind == "file":
        # Many file systems do not tell A from a, some not one way to write an umlaut from the other.
        key = unicodedata.normalize("NFC", str(path)).casefold()
        if key in seen:
            raise BadArchive(f"{archive} holds {member.name!r} twice: refused")
        seen.add(key)
    return path


def selected(path: PurePosixPath, member: Member, patterns: Sequence[str] | None) -> bool:
    # __MACOSX/ and ._x.jpg are macOS's copies of file attributes, not images
    if member.kind != "file" or "__MACOSX" in path.parts or path.name.startswith("._"):
        return False
    return patterns is None or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def require_room(left: int, path: PurePath, archive: Path) -> None:
    if left < 0:
        raise BadArchive(f"{archive} unpacks to more than it should (stopped at {path.name!r}): refused")


def write_member(source: IO[bytes], path: Path, left: int, archive: Path) -> int:
    """Write one member, at most `left` bytes; return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(path, "xb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            require_room(left - written, path, archive)
            file.write(chunk)
    return written
