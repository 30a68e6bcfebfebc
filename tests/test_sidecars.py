"""Captions beside their photos: a person's text stays, and so does all else in an XMP file."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.data.dataset import load_caption_set
from captioning.data.layouts import find_captions_file, read_captions
from captioning.data.sidecars import DC, EMPTY, OWN, RDF, TIFF, SidecarWriter, parse_xmp, with_caption
from captioning.io import UserError

FACTS = {"caption": "a dog <runs> & jumps over Müll", "model": "tiny 0123, flickr-caption 1", "confidence": "0.7100"}
# As darktable writes it: one rdf:Description with its edits, short and long, and a comment of nobody's.
DARKTABLE = """\
<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:darktable="http://darktable.sf.net/"
    xmp:Rating="3" darktable:note="a > b">
   <!-- kept -->
   <darktable:history>
    <rdf:Seq>
     <rdf:li darktable:operation="exposure" darktable:params="0000a0ff"/>
    </rdf:Seq>
   </darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""


def said(content: bytes, name: str) -> list[str]:
    """The texts of a property, read by another parser."""
    uri, local = name.split()
    return ["".join(each.itertext()).strip() for each in ElementTree.fromstring(content).iter(f"{{{uri}}}{local}")]


@pytest.mark.parametrize("before", (EMPTY, DARKTABLE, "\ufeff" + DARKTABLE), ids=("empty", "darktable", "BOM"))
def test_an_xmp_file_keeps_all_else(before):
    first = with_caption(before.encode(), FACTS)
    for name in (f"{DC} description", f"{TIFF} ImageDescription", f"{OWN} caption"):
        assert said(first, name) == [FACTS["caption"]]
    assert said(first, f"{OWN} model") == [FACTS["model"]] and said(first, f"{OWN} confidence") == ["0.7100"]
    assert re.sub(rb"\n +<(dc|tiff|fc):.*", b"", first).decode() == before
    again = with_caption(first, FACTS | {"caption": "a cat"})
    assert said(again, f"{DC} description") == ["a cat"] and len(said(again, f"{OWN} model")) == 1
    assert with_caption(again, FACTS) == first


def test_an_empty_description_and_what_another_program_made_of_ours():
    short = EMPTY.replace('rdf:about="">\n  </rdf:Description>', 'rdf:about=""/>')
    assert said(with_caption(short.encode(), FACTS), f"{DC} description") == [FACTS["caption"]]
    # exiv2 puts simple properties into the tag
    for attribute, own in (("a cat", True), ("a cat on a mat", False)):
        rewritten = EMPTY.replace(
            'rdf:about="">',
            f'rdf:about="" xmlns:own="{OWN}" xmlns:dc="{DC}" own:caption="{attribute}" own:model=\'x>\'>\n<dc:description><rdf:Alt>'
            '<rdf:li xml:lang="x-default">a cat</rdf:li></rdf:Alt></dc:description>',
        ).encode()
        if own:
            now = with_caption(rewritten, FACTS)
            assert b"own:caption" not in now and b"own:model" not in now
            assert said(now, f"{DC} description") == [FACTS["caption"]]
        else:  # somebody has corrected it
            with pytest.raises(ValueError, match="a person wrote"):
                with_caption(rewritten, FACTS)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]>' + EMPTY.encode(), "DTD"),
        (EMPTY.encode("utf-16"), "not XML in UTF-8"),
        (b"<a/>", "no rdf:Description"),
        (b"", "not XML"),
        (EMPTY.encode() + b" " * (16 << 20), "more than 16 MB"),
        (EMPTY.replace("</rdf:D", f'<d:description xmlns:d="{DC}">by me</d:description></rdf:D').encode(), "a person"),
        (EMPTY.replace("rdf:about", f'xmlns:t="{TIFF}" t:ImageDescription="by me" rdf:about').encode(), "a person"),
        (b"<a>" * 10**5 + b"</a>" * 10**5, "no rdf:Description"),
    ],
    ids=("entities", "UTF-16", "other XML", "nothing", "large", "a person's", "a person's, short", "deep"),
)
def test_a_strangers_file_stays(tmp_path, content, message):
    file = tmp_path / "beach.jpg.xmp"
    file.write_bytes(content)
    assert message in SidecarWriter("xmp", None, "model").write(tmp_path / "beach.jpg", "a dog", 0.5)
    assert file.read_bytes() == content


def test_texts_of_a_person_stay(tmp_path):
    (tmp_path / "b.txt").write_text("mine")
    for caption in ("a dog", "a cat"):  # the second is another command
        writer = SidecarWriter("txt", "ohwx,", "model")
        assert writer.write(tmp_path / "a.jpg", caption, None) is None
        assert (tmp_path / "a.txt").read_text() == f"ohwx, {caption}\n"
        assert "a person wrote it" in writer.write(tmp_path / "b.jpg", caption, None)
        assert "is that of" in writer.write(tmp_path / "a.png", caption, None)
    assert (tmp_path / "b.txt").read_text() == "mine"
    (tmp_path / "a.txt").write_text("ohwx, a dog that I know")
    assert "a person wrote it" in SidecarWriter("txt", None, "model").write(tmp_path / "a.jpg", "a dog", None)


def test_a_folder_of_captions_beside_photos_is_a_data_set(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg", "e.jpg"):
        (folder / "images" / name).write_text(name)
    (folder / "train.txt").write_text("a.jpg")  # not of a data set that lies below
    (folder / "images" / "a.txt").write_text("a dog runs\n\nthe dog\n")
    (folder / "images" / "c.png.xmp").write_bytes(
        EMPTY.replace("</rdf:D", f'<d:description xmlns:d="{DC}">a cat</d:description></rdf:D').encode()
    )
    assert SidecarWriter("txt", None, "model").write(folder / "images" / "b.jpg", "a boat", None) is None
    assert SidecarWriter("xmp", None, "model").write(folder / "images" / "d.jpg", "a bird", None) is None
    assert find_captions_file(folder) == folder / "images"
    mine = [("a.jpg", "a dog runs"), ("a.jpg", "the dog"), ("c.png", "a cat")]
    for generated, expected in ((False, mine), (True, [*mine, ("b.jpg", "a boat"), ("d.jpg", "a bird")])):
        table, _ = read_captions(folder / "images", generated)
        assert sorted(table.itertuples(index=False, name=None)) == sorted(expected)
    assert load_caption_set(folder, whole=True).names == ["a.jpg", "c.png"]
    data = load_caption_set(folder / "images", generated=True)
    assert data.names == ["a.jpg", "b.jpg", "c.png", "d.jpg"] and data.split_source.startswith("drawn by image")
    (folder / "images" / "a.txt").unlink()
    (folder / "images" / "c.png.xmp").unlink()
    with pytest.raises(UserError, match="--generated_captions"):
        read_captions(folder / "images")
    (folder / "images" / "a.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match="beside .*a.jpg cannot be read"):
        read_captions(folder / "images")


def test_captions_beside_photos(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("p01.jpg", "p02.jpg"):
        shutil.copy(tiny_runs["data"] / "Images" / name, name)
    Path("p02.txt").write_text("mine")
    flags = ["--mode", "caption", "--model_path", str(tiny_runs["attention"]), "--images", ".", "--sidecar"]
    assert trainer.main([*flags, "txt", "--prefix", "ohwx"]) == 0
    captured = capsys.readouterr()
    printed = dict(line.split("\t")[:2] for line in captured.out.splitlines())
    assert Path("p01.txt").read_text() == f"ohwx {printed['p01.jpg']}\n" and Path("p02.txt").read_text() == "mine"
    assert "Not written: p02.txt stays as it is: a person wrote it" in captured.err
    assert trainer.main([*flags, "xmp"]) == 0
    xmp = parse_xmp(Path("p02.jpg.xmp").read_bytes())
    assert xmp.captions() == [printed["p02.jpg"]] * 2 and xmp.own()
    assert said(Path("p02.jpg.xmp").read_bytes(), f"{OWN} model")[0].startswith(tiny_runs["attention"].name)
    assert RDF in Path("p01.jpg.xmp").read_text()
