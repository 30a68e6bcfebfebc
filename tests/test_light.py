"""What the light installation does: it captions, explains and shows the page without PyTorch and what training needs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import json
import sys

HEAVY = {"torch", "torchvision", "pandas", "spacy", "nltk", "matplotlib", "jiwer", "rouge_score", "openvino"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""
PHOTO = """
from PIL import Image, ImageDraw

image = Image.new("RGB", (320, 240), (90, 160, 230))
draw = ImageDraw.Draw(image)
draw.rectangle((0, 150, 320, 240), fill=(60, 140, 50))
draw.ellipse((120, 110, 220, 180), fill=(120, 80, 40))
image.save("drawn.png")
"""
CAPTIONS = """
import contextlib
import io

import numpy as np

from captioning import Captioner

captioner = Captioner.load()
result = captioner("drawn.png")
assert result.words and result.text == " ".join(word.text for word in result.words)
assert all(word.attention.shape == (7, 7) and abs(word.attention.sum() - 1) < 1e-3 for word in result.words)
assert 0 < result.confidence < 1
assert captioner(image).text == result.text
drawn = captioner(np.asarray(image), top_p=0.9, num_captions=3)
assert drawn.words and drawn.words[0].attention is None

from captioning.config.settings import parse_flags
from captioning.modes.caption import caption_images

with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert caption_images(parse_flags(["--mode", "caption", "--images", "drawn.png", "--json"])) == 0
(line,) = printed.getvalue().splitlines()
(entry,) = [json.loads(line)]
assert (entry["caption"], entry["path"]) == (result.text, "drawn.png"), entry
"""
PAGE = """
from pathlib import Path

from page_server import ask, serving

from captioning.captioner import Captioner
from captioning.modes import serve

captioner = Captioner.load()
how = captioner.decoding()
page = serve.build_page(captioner, [], how)
with serving(serve.build_app(captioner, page, "127.0.0.1", how), page) as address:
    answer = ask(address, Path("drawn.png").read_bytes(), "?maps=true")
found = answer.json()
assert answer.status_code == 200 and found["caption"] == captioner(Path("drawn.png")).text
assert found["words"] and all(word["map"].startswith("data:image/png") for word in found["words"])
assert found["photo"].startswith("data:image/jpeg")
"""
IMPORTS = """
import sys

import captioning
import captioning.captioner

loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & set(sys.argv[1:])))
"""
HEAVY = [
    "torch", "torchvision", "pandas", "spacy", "nltk", "matplotlib", "jiwer", "rouge_score", "openvino", "scipy", "onnx",
    "onnxscript", "fastapi", "uvicorn", "huggingface_hub", "timm", "tqdm",
]  # fmt: skip


def run(script: str, folder: Path, *words: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_included_captioner_captions_and_explains_without_pytorch(tmp_path):
    run(BLOCK + PHOTO + CAPTIONS, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="requirements-serve.txt is not installed")
def test_the_page_with_maps_is_served_without_pytorch(tmp_path):
    run(BLOCK + PHOTO + PAGE, tmp_path)


def test_importing_the_captioner_imports_nothing_of_training(tmp_path):
    assert run(IMPORTS, tmp_path, *HEAVY).split() == []
