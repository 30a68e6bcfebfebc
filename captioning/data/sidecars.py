"""Captions beside their photos: `photo.txt`, as LoRA trainers read it, and `photo.jpg.xmp`, as photo programs do.

A text is the program's own where the manifest of its folder has its hash (txt), or where a tag of the program beside it
repeats it (xmp). Only such a text is written anew: every other one is a person's. An XMP file is a stranger's: it is
bounded and has no DTD; all but the caption keeps its bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape

from captioning.data.images import IMAGE_ENDINGS
from captioning.io import UserError, printable, sha256, write_atomic, write_text

MANIFEST = "captions.sha256"  # of the texts in a folder, in the form of sha256sum
LARGEST = 16 << 20  # bytes of an XMP file
RDF, DC, TIFF = (
    "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "http://purl.org/dc/elements/1.1/",
    "http://ns.adobe.com/tiff/1.0/",
)
OWN = "https://pypi.org/project/flickr-caption/xmp/1.0/"  # a name, not an address
TEXTS = (f"{DC} description", f"{TIFF} ImageDescription")
OURS = (*TEXTS, f"{OWN} caption", f"{OWN} model", f"{OWN} confidence")
EMPTY = f"""\
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about="">
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
TAG = re.compile(rb"""<(?:[^>"']|"[^"]*"|'[^']*')*>""")


class SidecarWriter:
    """Writes captions beside their photos."""

    def __init__(self, kind: str, prefix: str | None, model: str):
        """Args: kind: `txt` or `xmp`; prefix: comes first in a txt; model: its name and version, for an xmp."""
        self.kind, self.prefix, self.model = kind, prefix, model
        self.manifests: dict[Path, set[str]] = {}
        self.photos: dict[Path, Path] = {}  # by the file that was written

    def write(self, photo: Path, caption: str, confidence: float | None) -> str | None:
        """Write the caption of a photo; return None, or why it is not written.

        Raises:
            UserError: the file cannot be written.
        """
        file = photo.with_suffix(".txt") if self.kind == "txt" else photo.with_name(f"{photo.name}.xmp")
        if (other := self.photos.setdefault(file, photo)) != photo:
            return f"{file} is that of {other}, not of {photo}"
        if os.path.lexists(file) and not file.is_file():
            return f"{file} is not a file"
        if self.kind == "txt":
            return self.write_text(file, f"{self.prefix} {caption}" if self.prefix else caption)
        facts = {"caption": caption, "model": self.model} | (
            {} if confidence is None else {"confidence": f"{confidence:.4f}"}
        )
        try:
            content = with_caption(read_xmp(file) if file.exists() else EMPTY.encode(), facts)
        except ValueError as error:
            return f"{file} stays as it is: {error}"
        write_atomic(file, lambda opened: opened.write(content))
        return None

    def write_text(self, file: Path, text: str) -> str | None:
        known = self.manifests.setdefault(file.parent, read_manifest(file.parent))
        if file.exists() and manifest_line(file) not in known:
            return f"{file} stays as it is: a person wrote it"
        content = f"{text}\n"
        line = f"{hashlib.sha256(content.encode()).hexdigest()}  {printable(file.name)}"
        if line not in known:  # it comes first: whatever ends the program, no text of its own is taken for a person's
            known.add(line)
            with open(file.parent / MANIFEST, "a", encoding="utf-8") as manifest:
                manifest.write(f"{line}\n")
        write_text(file, content)
        return None


def manifest_line(file: Path) -> str:
    return f"{sha256(file)}  {printable(file.name)}"


def read_manifest(folder: Path) -> set[str]:
    """Return the lines of a folder's manifest, none where it has none."""
    file = folder / MANIFEST
    return set(file.read_text("utf-8", errors="replace").split("\n")) if file.is_file() else set()


# --------------------------------------------------------------------------------------------------
# XMP


class Xmp(NamedTuple):
    """What an XMP file says of its photo, and at which bytes."""

    texts: dict[str, list[str]]  # of the properties by "namespace name"
    elements: list[tuple[int, int]]  # those of OURS
    descriptions: list[tuple[int, int]]  # start tags and end tags of the rdf:Descriptions
    prefixes: dict[str, str]  # of namespaces

    def captions(self) -> list[str]:
        """Return the texts that describe the photo."""
        return [text for name in TEXTS for text in self.texts[name] if text]

    def own(self) -> bool:
        """Return whether all of them are the program's own."""
        return set(self.captions()) <= set(self.texts[f"{OWN} caption"])


def read_xmp(file: Path) -> bytes:
    """Return the bytes of a file, of one that is too large some more than `parse_xmp` takes."""
    with open(file, "rb") as opened:
        return opened.read(LARGEST + 1)


def parse_xmp(content: bytes) -> Xmp:
    """Parse an XMP file. Raises ValueError: not XMP in UTF-8, too large, or with a DTD."""
    found = Xmp(defaultdict(list), [], [], {})
    path: list[str] = []
    places: list[int] = []
    text: list[str] = []
    parser = expat.ParserCreate("utf-8", " ")

    def refuse(*_: object) -> None:
        raise ValueError("it has a DTD")

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        places.append(parser.CurrentByteIndex)
        if path[-2:] == [f"{RDF} RDF", f"{RDF} Description"]:
            for key, value in attributes.items():  # the short form of a property
                found.texts[key].append(value.strip())
        elif path[-3:-1] == [f"{RDF} RDF", f"{RDF} Description"]:
            text.clear()

    def end(name: str) -> None:
        begun = places.pop()
        if path[-2:] == [f"{RDF} RDF", f"{RDF} Description"]:
            found.descriptions.append((begun, parser.CurrentByteIndex))
        elif path[-3:-1] == [f"{RDF} RDF", f"{RDF} Description"] and name in OURS:
            found.texts[name].append("".join(text).strip())
            found.elements.append((begun, tag_end(content, parser.CurrentByteIndex)))
        path.pop()

    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MB")
    parser.StartDoctypeDeclHandler = refuse
    parser.StartNamespaceDeclHandler = lambda prefix, uri: found.prefixes.update({prefix or "": uri})
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    try:
        content.decode("utf-8")  # expat reads UTF-16, whatever it was told
        parser.Parse(content, True)
    except (expat.ExpatError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not XML in UTF-8: {error}") from error
    if not found.descriptions:
        raise ValueError("it has no rdf:Description")
    return found


def tag_end(content: bytes, start: int) -> int:
    """Return where the tag that begins at a byte ends."""
    tag = TAG.match(content, start)
    return tag.end() if tag else start


def with_caption(content: bytes, facts: dict[str, str]) -> bytes:
    """Return an XMP file with another caption, or its first.

    Args:
        facts: `caption`, and what else is said of it.

    Raises:
        ValueError: as in `parse_xmp`, or the caption is a person's.
    """
    xmp = parse_xmp(content)
    if not xmp.own():
        raise ValueError("a person wrote its description")
    said = f'<rdf:Alt xmlns:rdf="{RDF}"><rdf:li xml:lang="x-default">{escape(printable(facts["caption"]))}</rdf:li></rdf:Alt>'
    lines = [f'<dc:description xmlns:dc="{DC}">{said}</dc:description>']
    lines += [f'<tiff:ImageDescription xmlns:tiff="{TIFF}">{said}</tiff:ImageDescription>']
    lines += [f'<fc:{name} xmlns:fc="{OWN}">{escape(printable(fact))}</fc:{name}>' for name, fact in facts.items()]
    block = "".join(f"\n   {line}" for line in lines).encode()
    edits = [(len(content[:start].rstrip()), end, b"") for start, end in xmp.elements]
    names = [
        f"{prefix}:{name.split()[1]}" for prefix, uri in xmp.prefixes.items() for name in OURS if name.split()[0] == uri
    ]
    short = re.compile(rf"""\s+(?:{"|".join(map(re.escape, names)) or "(?!)"})\s*=\s*(?:"[^"]*"|'[^']*')""".encode())
    for number, (start, end) in enumerate(xmp.descriptions):
        tag = content[start : tag_end(content, start)]
        changed = short.sub(b"", tag)
        if number == 0 and tag.endswith(b"/>"):
            name = re.split(rb"[\s/]", tag[1:], maxsplit=1)[0]
            changed = changed[:-2].rstrip() + b">" + block + b"\n  </" + name + b">"
        elif number == 0:
            place = len(content[:end].rstrip())
            edits.append((place, place, block))
        edits.append((start, start + len(tag), changed))
    for start, end, new in sorted(edits, reverse=True):
        content = content[:start] + new + content[end:]
    return content


# --------------------------------------------------------------------------------------------------
# Reading


def photos_in(folder: Path) -> list[tuple[Path, Path, Path]]:
    """Return the photos of a folder that have a caption beside them, each with its txt and its xmp, of which one exists."""
    photos = (
        sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS) if folder.is_dir() else []
    )
    files = [(photo, photo.with_suffix(".txt"), photo.with_name(f"{photo.name}.xmp")) for photo in photos]
    return [(photo, text, xmp) for photo, text, xmp in files if text.is_file() or xmp.is_file()]


def captions_beside(folder: Path, generated: bool) -> Iterator[tuple[int, str, str]]:
    """Yield a number, the name and a caption of each photo in a folder: the lines of its txt, the description of its xmp.

    Args:
        generated: whether the program's own are among them.

    Raises:
        UserError: a file that cannot be read.
    """
    known = read_manifest(folder)
    for number, (photo, text, xmp) in enumerate(photos_in(folder), 1):
        captions: list[str] = []
        try:
            if text.is_file() and (generated or manifest_line(text) not in known):
                captions += text.read_text("utf-8-sig").split("\n")
            if xmp.is_file():
                found = parse_xmp(read_xmp(xmp))
                captions += found.captions() if generated or not found.own() else []
        except ValueError as error:
            raise UserError(f"the caption beside {photo} cannot be read: {error}") from error
        yield from ((number, photo.name, caption) for caption in dict.fromkeys(map(str.strip, captions)) if caption)
