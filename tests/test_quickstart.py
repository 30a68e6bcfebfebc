"""The notebook: continuous integration executes it; here it is checked without a kernel."""

import json
import re
from pathlib import Path

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.io import SCRIPT

NOTEBOOK = Path(trainer.__file__).parent / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_nothing_that_was_executed_is_stored():
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code"
    )
    assert all(cell["metadata"] == {} for cell in CELLS)


def test_its_code_is_python_and_its_recipe_is_taken(monkeypatch):
    for source in CODE:
        compile(re.sub(r"^%.*$", "", source, flags=re.MULTILINE), "cell", "exec")
    (training,) = (source for source in CODE if SCRIPT in source)
    commands: list[list[str]] = []
    names = {"run": lambda *words: commands.append([str(word) for word in words])}
    exec(training, names | {"DATASET": "demo", "data": Path("data"), "EPOCHS": 1})
    monkeypatch.chdir(NOTEBOOK.parent.parent)
    ((script, *flags),) = commands
    assert script == SCRIPT and trainer.parse_flags(flags).decoder == "attention"
