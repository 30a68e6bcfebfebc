"""Fetch Flickr8k and Flickr30k, or draw the demo set, and check that everything is there.

    python download_datasets.py                          # both Flickr sets, into data/flickr8k and data/flickr30k
    python download_datasets.py --dataset flickr8k
    python download_datasets.py --dataset demo           # drawn here, nothing is downloaded
    python download_datasets.py --verify-only            # only say whether the sets are complete

An interrupted download goes on where it stopped when the command is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fnmatch
import gzip
import io
import os
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
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from captioning.io import UserError, first_line, format_bytes, make_directory, require_free_space, run_command

if TYPE_CHECKING:
    import requests
    from filelock import AcquireReturnProxy

CHUNK = 1 << 20  # bytes moved at a time
ATTEMPTS = 5  # broken-off transfers in a row, none of which brought CHUNK bytes or more
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (15, 60)  # seconds to connect, and without a byte arriving
MAX_MEMBERS = 200_000  # of an archive: files of no bytes at all fill a disk too
MAX_PASSED_OVER = 1 << 30  # bytes of a tar that nobody wants, and that have to be decompressed all the same
MAX_READ = 8 * CHUNK  # of a tar at once; its headers may claim any length, and are read in one go
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
LICENCE_NOTE = "note: Flickr's images are for non-commercial research and education only"
TRAINING_SCRIPT = "flickr_image_caption_with_pytorch_resnet_lstm.py"


# --------------------------------------------------------------------------------------------------
# Where the data is


@dataclass(frozen=True)
class Mirror:
    """One place to get an archive from; several URLs are parts that are joined in their order."""

    file: str  # its name in the downloads folder, also for a file placed there by hand
    urls: tuple[str, ...]
    size: int  # bytes, roughly; twice as many are refused
    known_hash: str | None = None  # "md5:..." or "sha256:..."; None where nobody publishes one
    members: tuple[str, ...] = ("*.jpg",)  # which files of the archive are wanted, by file name


@dataclass(frozen=True)
class Part:
    """Something that a data set consists of: its images, or its captions and splits."""

    mirrors: tuple[Mirror, ...]  # tried in this order
    unpacked: int  # bytes on disk, an upper bound


@dataclass(frozen=True)
class Source:
    """A data set: how many images it has and where its parts are."""

    images: int
    image_folder: str
    parts: dict[str, Part]  # "captions" and "images"


RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
PARTS_RELEASE = "https://github.com/awsaf49/flickr-dataset/releases/download/v1.0/"


def karpathy_mirrors(member: str) -> tuple[Mirror, ...]:
    return tuple(
        Mirror(
            "caption_datasets.zip",
            (url,),
            36_745_453,
            "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
            (member,),
        )
        for url in (
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "https://huggingface.co/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip",
        )
    )


SOURCES = {
    "flickr8k": Source(
        images=8091,
        image_folder="Flicker8k_Dataset",  # sic: as the official archive spells it
        parts={
            "captions": Part(
                (
                    Mirror(
                        "Flickr8k_text.zip",
                        (RELEASE + "Flickr8k_text.zip",),
                        2_300_000,
                        "md5:bf6c1abcb8e4a833b7f922104de18627",
                        ("Flickr8k.token.txt", "Flickr_8k.*Images.txt"),
                    ),
                    *karpathy_mirrors("dataset_flickr8k.json"),
                ),
                unpacked=50_000_000,
            ),
            "images": Part(
                (
                    Mirror(
                        "Flickr8k_Dataset.zip",
                        (RELEASE + "Flickr8k_Dataset.zip",),
                        1_120_000_000,
                        "md5:f18a1e2920de5bd84dae7cf08ec78978",
                    ),
                    Mirror("flickr8k.zip", (PARTS_RELEASE + "flickr8k.zip",), 1_120_000_000),
                ),
                unpacked=2_000_000_000,
            ),
        },
    ),
    "flickr30k": Source(
        images=31_014,
        image_folder="flickr30k-images",
        parts={
            "captions": Part(karpathy_mirrors("dataset_flickr30k.json"), unpacked=200_000_000),
            "images": Part(
                (
                    Mirror(
                        "flickr30k-images.tar.gz",
                        ("https://uofi.app.box.com/shared/static/1cpolrtkckn4hxr1zhmfg0ln9veo6jpl.gz",),
                        4_440_000_000,
                        "md5:985ac761bbb52ca49e0c474ae806c07c",
                    ),
                    Mirror(
                        "flickr30k-images.zip",
                        ("https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/flickr30k-images.zip",),
                        4_400_000_000,
                    ),
                    Mirror(
                        "flickr30k.zip",
                        tuple(f"{PARTS_RELEASE}flickr30k_part0{number}" for number in range(3)),
                        4_440_000_000,
                    ),
                ),
                # Its last mirror may hold the images twice, as Kaggle's archive once did.
                unpacked=10_000_000_000,
            ),
        },
    ),
}


# --------------------------------------------------------------------------------------------------
# Downloading


class DownloadError(Exception):
    """A mirror did not give the file; the message says why, without the URL."""


def require_safe_url(url: str) -> None:
    """Only https, so that nobody between here and there can change what has no published checksum.

    Raises:
        DownloadError: another scheme, unless the server is this very machine (as in the tests).
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise DownloadError(f"{parts.scheme}://{parts.hostname} is not https")


def make_session() -> requests.Session:
    """A session that follows redirects to safe URLs only. Proxies of the environment are honoured by requests."""
    import requests

    def check_redirect(response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            target = urllib.parse.urljoin(response.url, response.headers["location"])
            require_safe_url(target)
            if response.url.startswith("https:") and not target.startswith("https:"):
                raise DownloadError("the server redirects from https to http")

    session = requests.Session()
    session.hooks["response"].append(check_redirect)
    # Compressed on the way, a file could neither be resumed nor compared with its size.
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "flickr-captioning-download/1"})
    return session


class ResumingDownloader:
    """A downloader for pooch that keeps what has arrived in `part` and asks only for the rest.

    The server is asked for the rest of the very file that `part` began with (If-Range): where it has another
    one meanwhile, it sends that whole.

    Args:
        part: where the bytes are collected; it outlives failures, Ctrl-C and this process.
        limit: bytes; a server that announces or sends more is given up.
        checked: whether a hash is compared in the end. Without one, only a rest that the server vouches for
            is glued on.
    """

    def __init__(self, part: Path, limit: int, checked: bool):
        self.part = part
        self.version = part.with_name(part.name + ".version")  # the server's name for what `part` began with
        self.limit = limit
        self.checked = checked

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> bool:
        """Fetch `url` into `output_file` (pooch's temporary file, which it compares with the known hash).

        Raises:
            DownloadError: the server refuses, sends too much, or broke off too often.
        """
        require_safe_url(url)
        session = make_session()
        failures, furthest = 0, self.have()
        with session:
            while (reason := self.transfer(session, url)) is not None:
                failures = 1 if self.have() - furthest >= CHUNK else failures + 1
                furthest = max(furthest, self.have())
                if failures == ATTEMPTS:
                    raise DownloadError(f"{reason}; given up after {ATTEMPTS} attempts")
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
        """One request. Returns None when the file is whole, else why it is not (worth another attempt)."""
        import requests

        version = self.version.read_text() if self.version.exists() else ""
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
        except requests.RequestException as error:
            return f"the connection failed ({type(error).__name__}) after {format_bytes(self.have())}"

    def judge_unsatisfiable(self, response: requests.Response, have: int) -> str | None:
        if response.headers.get("Content-Range", "").strip() == f"bytes */{have}":
            return None  # everything had arrived already; only the renaming was missing
        self.discard()
        return "what had arrived does not fit the server's file; starting anew"

    def receive(self, response: requests.Response, have: int, version: str) -> str | None:
        from tqdm import tqdm

        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if response.status_code == 206:
            span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if span.split("-")[0].strip() != str(have):
                self.discard()
                return f"the server sent another range ({span or 'unnamed'}) than asked for; starting anew"
            if version and file_version(response) not in ("", version):
                self.discard()
                return "the server's file has changed since the transfer began; starting anew"
            total = int(whole) if whole.isdigit() else total
        else:  # the first request, or the file has changed, or a server that knows no ranges sends all of it again
            total, have = (total - have if total is not None else None), 0
            self.discard()
        if total is not None and total > self.limit:
            raise DownloadError(f"the server announces {format_bytes(total)}, more than {format_bytes(self.limit)}")
        if not have:
            self.version.write_text(file_version(response))
        # urllib3 would throw the last, short chunk of a broken transfer away; the size is compared below instead.
        response.raw.enforce_content_length = False
        with (
            open(self.part, "ab" if have else "wb") as file,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=self.part.name.split(".")[0],
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):  # fmt: skip
            for chunk in response.iter_content(CHUNK):
                have += len(chunk)
                if have > self.limit:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        if have > self.limit:
            self.discard()
            raise DownloadError(f"the server sends more than the {format_bytes(self.limit)} that can be right; deleted")
        if total is not None and have < total:
            return f"the transfer broke off at {format_bytes(have)} of {format_bytes(total)}"
        return None


def file_version(response: requests.Response) -> str:
    """What If-Range may hold: a strong ETag, else the date of the last change, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def download(mirror: Mirror, directory: Path) -> Path:
    """Fetch a mirror's archive into `directory` unless it lies there already with the right bytes.

    Returns:
        the archive's path.

    Raises:
        DownloadError: it cannot be had from this mirror, or its bytes are wrong (they are deleted).
        UserError: it cannot be written.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # pooch says at length what we say in a line
    archive = directory / mirror.file
    if mirror.known_hash is None:
        print(f"  nobody publishes a checksum for {mirror.file}: relying on the check for completeness")
        if archive.exists():
            return archive
    names = [mirror.file] if len(mirror.urls) == 1 else [Path(url).name for url in mirror.urls]
    for url, name in zip(mirror.urls, names, strict=True):
        print(f"  {url}", flush=True)
        known_hash = mirror.known_hash if len(mirror.urls) == 1 else None
        # Named after the host too: half a file of one mirror is not continued with another's bytes.
        part = directory / f"{name}.{urllib.parse.urlsplit(url).hostname}.part"
        try:
            downloader = ResumingDownloader(part, 2 * mirror.size, checked=known_hash is not None)
            pooch.retrieve(url, known_hash, name, directory, downloader=downloader)
        except ValueError as error:  # how pooch reports a hash that differs, after deleting the file
            raise DownloadError(f"wrong bytes ({mirror.known_hash} expected); the file was deleted") from error
        except OSError as error:
            raise UserError(f"cannot write {directory / name}: {error}; what has arrived is kept, run again") from error
    if len(names) > 1:
        join_files([directory / name for name in names], archive)
    return archive


def join_files(parts: Sequence[Path], whole: Path) -> None:
    """Write the parts one after the other into `whole`, which appears when it is complete; then delete them."""
    temporary = whole.with_name(whole.name + ".joining")
    with open(temporary, "wb") as target:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target, CHUNK)
    os.replace(temporary, whole)
    for part in parts:
        part.unlink()


# --------------------------------------------------------------------------------------------------
# Unpacking


class BadArchive(UserError):
    """An archive that is damaged or that nobody should unpack."""


# What zipfile, tarfile and gzip raise over bytes that are none of theirs, encryption and unknown compressions.
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
        members: patterns of the file names (without folders) that are wanted; None for all.

    Raises:
        BadArchive: damaged, or with absolute paths, `..`, links, devices, a name twice, too many files or bytes.
        UserError: `target` is there already or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} is there already: move it away, then run again")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.unpacking")
    try:
        temporary.mkdir(parents=True)
        left, passed_over = max_bytes, 0
        seen: set[str] = set()
        with contextlib.ExitStack() as stack:
            opened = open_archive(archive, stack)
            for number, member in enumerate(list_members(opened)):
                if number == MAX_MEMBERS:
                    raise BadArchive(f"{archive} holds more than {MAX_MEMBERS} files: refused")
                path = check_member(member, archive, seen)
                if not wanted(path, member, members):
                    if isinstance(member.entry, tarfile.TarInfo):
                        passed_over += member.entry.size
                        require_room(MAX_PASSED_OVER - passed_over, path, archive)
                    continue
                with open_member(opened, member) as source:
                    left -= write_member(source, temporary / path, left, archive)
        os.replace(temporary, target)
    except DAMAGE as error:
        raise BadArchive(f"{archive} is damaged or no archive: {first_line(error)}") from error
    except OSError as error:
        if error.errno in BAD_NAMES:
            raise BadArchive(f"{archive} is damaged or no archive: {first_line(error)}") from error
        raise UserError(
            f"cannot unpack {archive} into {target.parent}: {error}. Free some space, or choose another --data_dir"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_archive(archive: Path, stack: contextlib.ExitStack) -> zipfile.ZipFile | tarfile.TarFile:
    with open(archive, "rb") as file:  # by content: a page of HTML is also sometimes called .zip
        beginning = file.read(2)
    if beginning == b"PK":
        return stack.enter_context(zipfile.ZipFile(archive))
    if beginning == b"\x1f\x8b":
        return stack.enter_context(
            tarfile.open(fileobj=stack.enter_context(BoundedGzip(archive)), mode="r:", errorlevel=2)
        )
    raise BadArchive(f"{archive} is neither a zip nor a tar.gz file (it begins with {beginning!r})")


class BoundedGzip(gzip.GzipFile):
    """A gzip file that refuses to read much at once: a long name of a tar may claim to be gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_READ:
            raise BadArchive(f"{self.name} holds a header of {size} bytes: refused")
        return super().read(size)


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
            if info.filename.endswith("/"):  # ZipInfo.is_dir trips over an empty name
                kind = "directory"
            elif stat.S_ISLNK(mode):
                kind = "link"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = "file of an unusual compression"
            else:
                kind = "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "device"
            yield Member(info.filename, kind, info)
        return
    for entry in opened:  # one pass: going back in a gzip stream means unpacking it again
        kind = "link" if entry.issym() or entry.islnk() else "device"
        kind = "file" if entry.isfile() else "directory" if entry.isdir() else kind
        kind = kind if entry.size >= 0 else "file of negative size"  # which leads tarfile in circles
        yield Member(entry.name, kind, entry)


def check_member(member: Member, archive: Path, seen: set[str]) -> PurePosixPath:
    """The member's path inside the target; refuses what could write or point elsewhere."""
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


def wanted(path: PurePosixPath, member: Member, patterns: Sequence[str] | None) -> bool:
    # __MACOSX/ and ._x.jpg are macOS's copies of file attributes, not pictures
    if member.kind != "file" or "__MACOSX" in path.parts or path.name.startswith("._"):
        return False
    return patterns is None or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def require_room(left: int, path: PurePath, archive: Path) -> None:
    if left < 0:
        raise BadArchive(f"{archive} unpacks to more than it should (stopped at {path.name!r}): refused")


def write_member(source: IO[bytes], path: Path, left: int, archive: Path) -> int:
    """Write one member, at most `left` bytes; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(path, "xb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            require_room(left - written, path, archive)
            file.write(chunk)
    return written


# --------------------------------------------------------------------------------------------------
# Is everything there?


def find_problems(directory: Path, images: int) -> dict[str, str]:
    """What the data set in `directory` lacks, read as training would read it: {} if it is complete.

    Args:
        images: how many image files are expected at least.

    Returns:
        a reason under "captions" (captions or split lists) and "images".
    """
    from captioning.dataset import find_splits
    from captioning.layouts import find_captions_file, find_image_directory, read_captions

    if not directory.is_dir():
        return dict.fromkeys(("captions", "images"), f"{directory} is not there")
    problems: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    used: set[str] = set()
    try:
        captions, _ = read_captions(find_captions_file(directory))
        names = sorted(captions)
        splits, source = find_splits([directory], names, 0, None, [])
        used = {names[i] for positions in splits.values() for i in positions}
        if source.startswith("drawn"):
            problems["captions"] = f"{directory} has no lists of its training, validation and test images"
    except UserError as error:
        problems["captions"] = str(error)
    try:
        folder = find_image_directory(directory, None, captions) if captions else fullest_folder(directory)
        found = image_names(folder)
        missing = sorted(used - found)
        if len(found) < images:
            problems["images"] = f"{folder} has {len(found)} of {images} images"
        elif missing:
            problems["images"] = f"{folder} lacks {len(missing)} images of the splits, {missing[0]} for example"
    except UserError as error:
        problems["images"] = str(error)
    return problems


def image_names(folder: Path) -> set[str]:
    """Names of the JPEG files in `folder` that are not empty."""
    return {
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(".jpg") and entry.is_file() and entry.stat().st_size > 0
    }


def fullest_folder(directory: Path) -> Path:
    """The folder with the most JPEG files at or below `directory`: every mirror calls it otherwise."""
    counts = {
        Path(place): sum(name.lower().endswith(".jpg") for name in files) for place, _, files in os.walk(directory)
    }
    if not any(counts.values()):
        raise UserError(f"{directory} has no images")
    return max(counts, key=lambda place: counts[place])


# --------------------------------------------------------------------------------------------------
# Fetching a data set


def fetch(name: str, data_dir: Path, force: bool) -> None:
    """Bring `data_dir/name` into a complete state, downloading only the parts that are missing (or all: `force`).

    The new parts are unpacked beside the old ones, which are replaced at the end and brought back if the
    result turns out to be incomplete.

    Raises:
        UserError: no mirror gave a part, the disk is full, or other files in `data_dir/name` are in the way.
    """
    source = SOURCES[name]
    target = data_dir / name
    old, fresh = data_dir / f".{name}.old", data_dir / f".{name}.new"
    problems = find_problems(target, source.images)
    if old.exists():  # the last run was killed while it was replacing files
        if problems:
            put_back(old, target)
            problems = find_problems(target, source.images)
        else:
            shutil.rmtree(old)
    if not problems and not force:
        print(f"{name}: complete already in {target} (--force downloads it again)")
        return
    wanted_parts = [part for part in source.parts if force or part in problems]
    if "images" in wanted_parts:
        require_no_other_folder(target, source)
    shutil.rmtree(fresh, ignore_errors=True)
    make_directory(fresh, "unpacking")
    downloads = make_directory(data_dir / "downloads", "the downloaded archives")
    archives: list[Path] = []
    try:
        for part in wanted_parts:
            print(f"{name}: fetching its {part}")
            archives.append(fetch_part(name, part, downloads, fresh, source))
        print(f"{name}: checking")
        swap_in(fresh, old, target)
        problems = find_problems(target, source.images)
        if problems:
            put_back(old, target)
            raise UserError(
                f"{target} is still incomplete: {'; '.join(problems.values())}. What was there before is untouched; "
                f"files of another layout may be in the way: move {target} aside and run again"
            )
        shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for archive in archives:
        archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another archive or a partial download is still in it
        downloads.rmdir()
    print(f"{name}: complete, {source.images} images and their captions are in {target}")


def require_no_other_folder(target: Path, source: Source) -> None:
    """Find out before gigabytes are fetched that training would go on reading another folder than theirs."""
    from captioning.layouts import IMAGE_DIRECTORIES

    for name in IMAGE_DIRECTORIES:
        if name not in (".", source.image_folder) and (target / name).is_dir():
            raise UserError(
                f"{target / name} is an image folder of another layout, which would be read instead of the downloaded "
                f"{source.image_folder}: complete it, or move it away and run again"
            )


def fetch_part(name: str, part_name: str, downloads: Path, fresh: Path, source: Source) -> Path:
    """Download and unpack one part into `fresh` from the first mirror that gives it; returns the archive."""
    part = source.parts[part_name]
    unpacked = fresh / f".{part_name}"
    reasons: list[str] = []
    for mirror in part.mirrors:
        archive = downloads / mirror.file
        # Parts to be joined are there twice for a moment.
        needed = mirror.size * min(2, len(mirror.urls)) - sum(
            file.stat().st_size for file in downloads.glob(f"{mirror.file}*")
        )
        require_free_space(downloads, max(0, needed) + mirror_room(part, mirror), f"{name}'s {part_name}")
        try:
            archive = download(mirror, downloads)
        except DownloadError as error:
            reasons.append(f"{mirror.urls[0]}: {error}")
            print(f"  {error}", file=sys.stderr)
            continue
        try:
            print(f"  unpacking {archive.name}", flush=True)
            extract_archive(archive, unpacked, part.unpacked, mirror.members)
            if part_name == "images":
                place_images(unpacked, fresh / source.image_folder, source.images)
            else:
                place_captions(unpacked, fresh, mirror.members, archive)
        except BadArchive as error:
            archive.unlink()  # wrong in itself: keeping it would only fail again
            shutil.rmtree(unpacked, ignore_errors=True)
            reasons.append(f"{mirror.urls[0]}: {error}; deleted")
            print(f"  {error}; deleted", file=sys.stderr)
            continue
        shutil.rmtree(unpacked, ignore_errors=True)
        return archive
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    raise UserError(
        f"no mirror gave {name}'s {part_name}:{listed}\n"
        f"Run the same command again later, or download one of them by hand, save it as "
        f"{' or '.join(dict.fromkeys(str(downloads / mirror.file) for mirror in part.mirrors))}, and run again"
    )


def mirror_room(part: Part, mirror: Mirror) -> int:
    """Bytes to keep free for unpacking: JPEGs hardly shrink in an archive, text may; never more than the bound."""
    return min(part.unpacked, mirror.size * 5 // 4 if mirror.members == ("*.jpg",) else part.unpacked)


def place_images(unpacked: Path, folder: Path, expected: int) -> None:
    try:
        fullest = fullest_folder(unpacked)
    except UserError as error:
        raise BadArchive("it holds no images") from error
    found = len(image_names(fullest))
    if found < expected:
        raise BadArchive(f"it holds {found} of {expected} images")
    os.replace(fullest, folder)
    for entry in folder.iterdir():  # an archive may hold its images twice, one folder inside the other
        if entry.is_dir():
            shutil.rmtree(entry)


def place_captions(unpacked: Path, fresh: Path, members: Sequence[str], archive: Path) -> None:
    files = [path for path in sorted(unpacked.rglob("*")) if path.is_file()]
    for pattern in members:
        if not any(fnmatch.fnmatchcase(path.name, pattern) for path in files):
            raise BadArchive(f"{archive} holds no {pattern}")
    for path in files:
        os.replace(path, fresh / path.name)


def swap_in(fresh: Path, old: Path, target: Path) -> None:
    """Move every entry of `fresh` into `target`; what it replaces goes to `old`, other files stay."""
    target.mkdir(exist_ok=True)
    old.mkdir()
    for entry in sorted(fresh.iterdir()):
        if (target / entry.name).exists():
            os.replace(target / entry.name, old / entry.name)
        os.replace(entry, target / entry.name)


def put_back(old: Path, target: Path) -> None:
    """Undo `swap_in` as far as something was replaced."""
    for entry in sorted(old.iterdir()):
        replacement = target / entry.name
        if replacement.is_dir():
            shutil.rmtree(replacement)
        else:
            replacement.unlink(missing_ok=True)
        os.replace(entry, replacement)
    old.rmdir()


# --------------------------------------------------------------------------------------------------
# The command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog=LICENCE_NOTE[0].upper() + LICENCE_NOTE[1:] + "."
    )
    parser.add_argument(
        "--dataset", choices=["flickr8k", "flickr30k", "both", "demo"], default="both",
        help="which data set; demo draws a small one without downloading (default: both Flickr sets)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true",
        help="get it again even if it is complete; the old files are kept until the new ones are checked",
    )  # fmt: skip
    parser.add_argument(
        "--verify-only", action="store_true",
        help="only say whether each data set is complete; the exit code is 0 if all are, else 1",
    )  # fmt: skip
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR",
        help="the data sets go to DIR/flickr8k, DIR/flickr30k and DIR/demo (default: data)",
    )  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> int:
    names = ["flickr8k", "flickr30k"] if arguments.dataset == "both" else [arguments.dataset]
    data_dir: Path = arguments.data_dir
    if arguments.verify_only:
        return verify(names, data_dir)
    make_directory(data_dir, "the data sets")
    with waiting_lock(data_dir):
        return bring(names, data_dir, arguments.force)


def waiting_lock(data_dir: Path) -> AcquireReturnProxy:
    """Have the data sets to oneself; where another process is bringing one, say so and wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(data_dir / ".download.lock")
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        print(f"Another download into {data_dir} is under way; waiting for it ...", flush=True)
        return lock.acquire()


def bring(names: Sequence[str], data_dir: Path, force: bool) -> int:
    if names == ["demo"]:
        from captioning.demo_set import draw_demo_dataset

        draw_demo_dataset(data_dir / "demo", redraw=force)
        print(f"demo: complete, 800 drawn scenes and their captions are in {data_dir / 'demo'}")
    else:
        print(LICENCE_NOTE)
        for name in names:
            fetch(name, data_dir, force)
    elsewhere = "" if data_dir == Path("data") else f" --data_dir {data_dir / names[0]}"
    print(f"Next: python {TRAINING_SCRIPT} --dataset_type {names[0]}{elsewhere}")
    return 0


def verify(names: Sequence[str], data_dir: Path) -> int:
    complete = True
    for name in names:
        problems = find_problems(data_dir / name, SOURCES[name].images if name in SOURCES else 800)
        reasons = "; ".join(dict.fromkeys(problems.values()))
        mend = f" (`python download_datasets.py --dataset {name} --data_dir {data_dir}` gets what is missing)"
        print(f"{name}: {'incomplete: ' + reasons + mend if problems else 'complete'}")
        complete = complete and not problems
    return 0 if complete else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0 done, 1 incomplete (--verify-only), 2 an error, 130 Ctrl-C."""
    arguments = get_parser().parse_args(argv)
    # Progress must show line by line in a log file too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    return run_command(lambda: run(arguments), "stopped; run the same command again to go on where it stopped")


if __name__ == "__main__":
    sys.exit(main())
