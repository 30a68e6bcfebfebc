"""Models from the Hugging Face hub, which is a server on 127.0.0.1 here; and the card that the hub reads."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PureWindowsPath

import pytest
from fuzz_targets import sound_checkpoint
from local_server import Server, answer, running_server, serve

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.io import UserError
from captioning.modes import export as export_model
from captioning.runs.checkpoints import load_checkpoint
from captioning.runs.directories import find_checkpoint
from captioning.runs.forms import GRAPHS
from captioning.runs.hub import LARGEST, NAME

huggingface_hub = pytest.importorskip("huggingface_hub", reason="requirements-hub.txt is not installed")
MODEL = "hf-hub:someone/tiny"
FILES = ("config.json", "vocabulary.json", "split.json", "model.safetensors", *GRAPHS)


def publish(server: Server, folder: Path, commit: str) -> None:
    """Have the hub show a folder as someone/tiny, whose branch main is at this commit."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    server.routes["/api/models/someone/tiny/revision/main"] = serve(json.dumps({"id": "x", "sha": commit}).encode())
    tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in files.items()]
    listing = serve(json.dumps(tree).encode())
    server.routes[f"/api/models/someone/tiny/tree/{commit}?recursive=true&expand=false"] = listing
    for name, body in files.items():
        server.routes[f"/someone/tiny/resolve/{commit}/{name}"] = with_commit(body, commit)


def with_commit(body: bytes, commit: str, size: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": commit}
    return lambda handler: answer(handler, body, Content_Length=str(size or len(body)), **headers)


def refuse(status: int, code: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: answer(handler, b"", status, X_Error_Code=code)


@pytest.fixture(scope="module")
def shared(tiny_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, with a file beside it that nobody asked for."""
    folder, path = tmp_path_factory.mktemp("hub") / "shared", tiny_runs["attention"] / "best.pt"
    export_model.export(load_checkpoint(path), path, folder, None)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('executed')")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub that has nothing yet, an empty cache, and an empty folder to run in."""
    from huggingface_hub import constants

    with running_server(monkeypatch) as server:
        huggingface_hub.close_session()  # whose proxies are those of another test
        monkeypatch.setattr(constants, "ENDPOINT", server.url(""))  # as HF_ENDPOINT is read once, at the first import
        files = server.url("/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server
        huggingface_hub.close_session()


def caption(image: Path, *flags: str) -> int:
    return trainer.main(["--mode", "caption", "--images", str(image), "--device", "cpu", *flags])


def test_a_model_of_the_hub_captions_tests_and_exports(hub, shared, tiny_runs, capsys):
    publish(hub, shared, "a" * 40)
    image = tiny_runs["data"] / "Images" / "p00.jpg"
    assert caption(image, "--model_path", str(shared)) == 0
    local = capsys.readouterr().out
    assert caption(image, "--model_path", MODEL) == 0
    printed = capsys.readouterr()
    digest = hashlib.sha256((shared / "model.safetensors").read_bytes()).hexdigest()
    assert printed.out == local and f"commit {'a' * 40}, SHA-256 of its weights {digest}" in printed.err
    assert {path.rsplit("/")[-1] for path, _ in hub.requests if "/resolve/" in path} == set(FILES)

    folder = find_checkpoint(Path(f"{MODEL}@main")).parent
    assert trainer.main(["--mode", "test", "--model_path", MODEL, "--data_dir", str(tiny_runs["data"])]) == 0
    assert {file.name for file in folder.iterdir()} == set(FILES), "something was written into the hub's cache"
    results = Path("saved_models/hub/someone--tiny") / ("a" * 40)
    assert json.loads((results / "test_metrics.json").read_text())[0]["images"] == 2
    assert trainer.main(["--mode", "export", "--model_path", MODEL, "--output", "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()
    assert "| test | 2 | beam 3 |" in Path("again/README.md").read_text()


def test_later_and_earlier_commits_and_no_connection(hub, shared, tmp_path, monkeypatch, capsys):
    publish(hub, shared, "a" * 40)
    first = find_checkpoint(Path(MODEL))
    newer = Path(shutil.copytree(shared, tmp_path / "newer"))
    (newer / "split.json").unlink()  # a model may have none
    publish(hub, newer, "b" * 40)
    second = find_checkpoint(Path(MODEL))
    assert [first.parent.name, second.parent.name] == ["a" * 40, "b" * 40]
    assert not second.with_name("split.json").exists()

    asked = len(hub.requests)  # a commit never changes, so that nobody is asked for it
    assert find_checkpoint(Path(f"{MODEL}@{'a' * 40}")) == first and len(hub.requests) == asked
    hub.routes["/api/models/someone/tiny/revision/main"] = refuse(503, "")
    assert find_checkpoint(Path(MODEL)) == second
    assert "looking for what was fetched last" in capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(Path(MODEL)) == second
    with pytest.raises(UserError, match="not to be had .*offline.*: rerun .* or copy the model's folder"):
        find_checkpoint(Path(f"{MODEL}@later"))


def test_what_the_hub_refuses_and_what_is_no_model_of_ours_ends_with_a_line(hub, shared, tmp_path):
    about = "/api/models/someone/{}/revision/main"
    hub.routes[about.format("absent")] = refuse(404, "RepoNotFound")
    hub.routes[about.format("closed")] = refuse(403, "GatedRepo")
    hub.routes[about.format("tiny").replace("main", "later")] = refuse(404, "RevisionNotFound")
    hub.routes[about.format("odd")] = serve(b'{"siblings": 3}')
    partial = Path(shutil.copytree(shared, tmp_path / "partial"))
    (partial / "vocabulary.json").unlink()

    def refusal(name: str) -> str:
        with pytest.raises(UserError, match=f"^--model_path {re.escape(name)}: .*$") as refused:
            find_checkpoint(Path(name))
        return str(refused.value)

    publish(hub, partial, "c" * 40)
    assert "not a model that --mode export wrote, it has no vocabulary.json" in refusal(MODEL)
    publish(hub, shared, "d" * 40)
    large = with_commit(b"", "d" * 40, LARGEST["model.safetensors"] + 1)
    hub.routes[f"/someone/tiny/resolve/{'d' * 40}/model.safetensors"] = large
    assert "its model.safetensors has 4.0 GB" in refusal(MODEL)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    publish(hub, shared, "e" * 40)
    hub.routes[f"/someone/tiny/resolve/{'e' * 40}/config.json"] = refuse(403, "GatedRepo")
    assert "its owner decides who may have it" in refusal(MODEL)
    assert "the hub has no such model" in refusal("hf-hub:someone/absent")
    assert "ask on its page" in refusal("hf-hub:someone/closed")
    assert "no such branch, tag or commit" in refusal(f"{MODEL}@later")
    assert "not to be had" in refusal("hf-hub:someone/odd")
    for name in ("tiny", "some..one/tiny", "a/b/c", "a/b@", "a/b@../../x", "ä/b"):
        assert "expected hf-hub:OWNER/NAME or" in refusal(f"hf-hub:{name}")


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    with pytest.raises(UserError, match="not installed: python -m pip install -r requirements-hub.txt"):
        find_checkpoint(Path(MODEL))


def test_a_name_survives_windows_paths():
    assert NAME.fullmatch(PureWindowsPath(f"{MODEL}@v1.0").as_posix())


def test_the_hub_reads_the_cards_metadata():
    card = huggingface_hub.ModelCard(export_model.model_card(sound_checkpoint("attention"), []))
    data = card.data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-to-text", "pytorch", "other")
    assert (data.datasets, data.tags) == (["flickr30k"], ["image-captioning"])
    assert card.text.lstrip().startswith("# Image captioner") and "hf-hub:OWNER/NAME" in card.text
