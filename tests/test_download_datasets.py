"""The download script, end to end, on a flickr8k of ten images; nothing leaves this machine."""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Server, known_hash, running_server, serve, zipped
from PIL import Image

import download_datasets
from captioning.data import demo_set, fetch
from download_datasets import Mirror, Part, Source, download, main

NAMES = [f"{number:03d}.jpg" for number in range(10)]


@pytest.fixture(scope="module")
def bodies() -> dict[str, bytes]:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(jpeg, "JPEG")
    captions = "".join(f"{name}#{i}\ta red picture .\n" for name in NAMES for i in range(5))
    text = {"Flickr8k.token.txt": captions, "CrowdFlowerAnnotations.txt": "not extracted"}
    for split, names in {"train": NAMES[:8], "dev": NAMES[8:9], "test": NAMES[9:]}.items():
        text[f"Flickr_8k.{split}Images.txt"] = "\n".join(names) + "\n"
    images = {f"Flicker8k_Dataset/{name}": jpeg.getvalue() for name in NAMES}
    return {
        "text": zipped({name: content.encode() for name, content in text.items()}),
        "images": zipped({**images, "__MACOSX/Flicker8k_Dataset/._000.jpg": b"x"}),
        "mirror": zipped({name.replace("Flicker8k_Dataset", "flickr8k/Images"): jpeg for name, jpeg in images.items()}),
        "nine": zipped(dict(list(images.items())[:9])),
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(monkeypatch) as server:
        yield server


@pytest.fixture
def tiny(server: Server, bodies: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Server:
    """`SOURCES` with a flickr8k on the local server; the images' second mirror has no checksum."""
    wanted = ("*.token.txt", "Flickr_8k.*Images.txt")
    text = Mirror("text.zip", (server.url("/text"),), 9000, known_hash(bodies["text"]), wanted)
    images = (
        Mirror("images.zip", (server.url("/images"),), 20_000, known_hash(bodies["images"])),
        Mirror("mirror.zip", (server.url("/mirror"),), 20_000),
    )
    source = Source(10, "Flicker8k_Dataset", {"captions": Part((text,), 50_000), "images": Part(images, 50_000)})
    monkeypatch.setattr(download_datasets, "SOURCES", {"flickr8k": source})
    for name in ("text", "images", "mirror"):
        server.routes[f"/{name}"] = serve(bodies[name])
    return server


def call(data: Path, *flags: str) -> int:
    return main(["--dataset", "flickr8k", "--data_dir", str(data), *flags])


def files_in(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}


def test_parts_are_joined(server, tmp_path):
    body = bytes(range(256)) * 40
    server.routes["/p0"], server.routes["/p1"] = serve(body[:3000]), serve(body[3000:], break_at=100)
    whole = download(Mirror("file.bin", (server.url("/p0"), server.url("/p1")), 20_000), tmp_path)
    assert whole.read_bytes() == body
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_the_table_has_only_https_and_plain_names():
    for source in download_datasets.SOURCES.values():
        for part in source.parts.values():
            for entry in part.mirrors:
                assert all(url.startswith("https://") for url in entry.urls)
                assert re.fullmatch(r"[\w.-]+", entry.file)


def test_end_to_end(tiny, tmp_path, capsys):
    data = tmp_path / "data"
    assert call(data, "--verify-only") == 1
    assert call(data) == 0
    printed = capsys.readouterr().out
    assert printed.count("non-commercial") == 1
    assert "flickr8k: complete, 10 images" in printed
    assert "python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k" in printed
    assert sorted(path.name for path in data.iterdir()) == [".download.lock", "flickr8k"]
    assert {path.name for path in (data / "flickr8k").iterdir()} == {
        "Flicker8k_Dataset", "Flickr8k.token.txt",
        "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt",
    }  # fmt: skip
    assert call(data, "--verify-only") == 0
    asked = len(tiny.requests)
    assert call(data) == 0
    assert len(tiny.requests) == asked


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "incomplete"])
def test_next_mirror_is_used(tiny, tmp_path, capsys, bodies, fault):
    if fault == "missing":
        del tiny.routes["/images"]
    else:
        tiny.routes["/images"] = serve(bodies["nine"] if fault == "incomplete" else b"nonsense")
    assert call(tmp_path) == 0
    streams = capsys.readouterr()
    assert ("404" if fault == "missing" else "wrong bytes") in streams.err
    assert "no checksum is published for mirror.zip" in streams.out
    assert len(list((tmp_path / "flickr8k" / "Flicker8k_Dataset").iterdir())) == 10


def test_all_mirrors_failing_names_each(tiny, tmp_path, capsys, bodies):
    del tiny.routes["/images"]
    tiny.routes["/mirror"] = serve(bodies["nine"])
    assert call(tmp_path) == 2
    streams = capsys.readouterr()
    last = streams.err[streams.err.index("error:") :]
    assert f"{tiny.url('/images')}: the server answered 404" in last
    assert f"{tiny.url('/mirror')}: it holds 9 of 10 images" in last
    assert str(tmp_path / "downloads" / "images.zip") in last
    assert "complete, 10" not in streams.out
    assert not (tmp_path / "flickr8k").exists()
    assert not (tmp_path / "downloads" / "mirror.zip").exists()


def test_only_the_missing_part_is_fetched(tiny, tmp_path):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "Flickr_8k.devImages.txt").unlink()
    tiny.requests.clear()
    assert call(tmp_path, "--verify-only") == 1
    assert call(tmp_path) == 0
    assert [path for path, _ in tiny.requests] == ["/text"]


def test_an_empty_image_counts_as_missing(tiny, tmp_path, capsys):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "Flicker8k_Dataset" / "004.jpg").write_bytes(b"")
    assert call(tmp_path, "--verify-only") == 1
    assert "9 of 10 images" in capsys.readouterr().out


def test_force_replaces_and_keeps_the_old_data_on_failure_and_other_files_always(tiny, tmp_path):
    data = tmp_path / "flickr8k"
    assert call(tmp_path) == 0
    (data / "notes.txt").write_text("mine")
    before = files_in(data)
    (data / "Flicker8k_Dataset" / "001.jpg").write_bytes(b"altered")
    assert call(tmp_path, "--force") == 0
    assert files_in(data) == before
    tiny.routes["/images"] = tiny.routes["/mirror"] = serve(b"nonsense")
    assert call(tmp_path, "--force") == 2
    assert files_in(data) == before
    assert call(tmp_path, "--verify-only") == 0


def test_killed_while_replacing_heals_on_the_next_run(tiny, tmp_path, bodies):
    assert call(tmp_path) == 0
    before = files_in(tmp_path / "flickr8k")
    shutil.rmtree(tmp_path / "flickr8k" / "Flicker8k_Dataset")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "images.zip").write_bytes(bodies["images"])
    tiny.requests.clear()
    assert call(tmp_path) == 0
    assert files_in(tmp_path / "flickr8k") == before and not tiny.requests


def test_full_disk_is_reported_before_downloading(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    assert call(tmp_path) == 2
    assert "5 B free" in capsys.readouterr().err
    assert tiny.requests == []


def test_ctrl_c_keeps_what_has_arrived(tiny, tmp_path, capsys, bodies, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    tiny.routes["/images"] = serve(bodies["images"], break_at=1000)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.time, "sleep", interrupt)
        assert call(tmp_path) == 130
    assert "stopped" in capsys.readouterr().err
    assert (tmp_path / "downloads" / "images.zip.127.0.0.1.part").stat().st_size == 1000
    assert call(tmp_path) == 0
    assert ("/images", "bytes=1000-") in tiny.requests


def test_demo_and_its_verification(tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "demo", "--data_dir", str(tmp_path)]
    assert main([*flags, "--verify-only"]) == 1
    original = demo_set.draw_demo_dataset
    monkeypatch.setattr(demo_set, "draw_demo_dataset", lambda directory, redraw: original(directory, 10, 0, redraw))
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "--dataset_type demo" in printed and "non-commercial" not in printed
    assert download_datasets.find_problems(tmp_path / "demo", 10) == {}


def test_help_needs_no_heavy_imports():
    script = Path(download_datasets.__file__)
    code = "import sys, download_datasets\ntry: download_datasets.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'requests', 'pooch', 'PIL', 'tqdm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=script.parent, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--verify-only" in result.stdout
