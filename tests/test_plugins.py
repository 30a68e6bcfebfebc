"""An encoder and a decoder from a file outside the package, by one registry line each, through every mode."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PLUGIN = """
from typing import NamedTuple

import torch
from torch import nn

from captioning.data.dataset import PAD
from captioning.decoders.base import Decoder, DecoderOutput
from captioning.encoders.base import EncoderSpec


class TinySpec(EncoderSpec):
    def locate_weights(self, named, expected):
        return None, "7157000000000000"

    def load_stages(self, weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), nn.Conv2d(8, 12, 4, 4)]


TINY = TinySpec("tiny", 12, (127.0,) * 3, (128.0,) * 3, image_size=96, grid=3, terms="no weights worth a licence")


class GRUState(NamedTuple):
    hidden: torch.Tensor  # (rows, H)
    regions: torch.Tensor  # (I, 9, H)

    def select_rows(self, rows):
        return self._replace(hidden=self.hidden[rows])

    def select_images(self, images):
        return self._replace(regions=self.regions[images])


class GRUDecoder(Decoder):
    uses_grid = has_attention = True
    description = "a GRU that attends to them"

    def __init__(self, words, channels, embed, size):
        super().__init__()
        self.embed = nn.Embedding(words, embed, padding_idx=PAD)
        self.output_bias = nn.Parameter(torch.zeros(words))
        self.image = nn.Linear(channels, size)
        self.cell = nn.GRUCell(embed, size)
        self.output = nn.Linear(2 * size, embed)

    @classmethod
    def from_flags(cls, flags, vocabulary_size, spec):
        return cls(vocabulary_size, spec.channels, flags["embed_size"], flags["hidden_size"])

    def begin(self, features):
        regions = self.image(features)
        return GRUState(regions.mean(1), regions)

    def step(self, state, words):
        hidden = self.cell(self.embed(words), state.hidden)
        queries = hidden.view(state.regions.shape[0], -1, hidden.shape[1])  # (I, rows of an image, H)
        alphas = (queries @ state.regions.transpose(1, 2)).softmax(-1)
        context = (alphas @ state.regions).flatten(0, 1)
        output = DecoderOutput(torch.tanh(self.output(torch.cat([hidden, context], 1))), alphas.flatten(0, 1))
        return state._replace(hidden=hidden), output

    def forward(self, features, batch):
        first = self.begin(features)
        hidden, outputs, start = first.hidden[batch.row_image], [], 0
        for rows in batch.batch_sizes.tolist():
            state = GRUState(hidden[:rows], first.regions[batch.row_image[:rows]])  # each caption is an image of its own
            state, output = self.step(state, batch.inputs[start : start + rows])
            hidden, start = state.hidden, start + rows
            outputs.append(output)
        return DecoderOutput(torch.cat([o.hidden_out for o in outputs]), torch.cat([o.alphas for o in outputs]))
"""

DRIVER = """
import importlib.util
import json
import shutil
from pathlib import Path

from captioning.config import registry

registry.ENCODERS["tiny"] = registry.Entry("plugin:TINY")
registry.DECODERS["gru"] = registry.Entry("plugin:GRUDecoder", ("save_attention_viz", "attention_reg"))

import numpy as np
import torch

import pytest
from run_files import skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Captioner
from captioning.models.pytorch import PyTorchModel
from captioning.runs.checkpoints import load_checkpoint

skip_pictures(pytest.MonkeyPatch())  # no plug-in has a part in them


def run(*words):
    assert trainer.main([str(word) for word in words]) == 0, words


def weights(path):
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_checkpoint(path)["decoder"].items())])


flags = "--dataset_type custom --data_dir tiny --encoder tiny --decoder gru --embed_size 16 --hidden_size 16"
flags += " --freq_threshold 1 --batch_size 16 --learning_rate 0.01 --max_length 12 --attention_reg 0.1"
run(*flags.split(), "--epochs", 2, "--scst_epochs", 1)
(folder,) = Path("saved_models/custom/tiny_gru").iterdir()
before = weights(folder / "model_epoch_3.pt")

shutil.copy(folder / "model_epoch_1.pt", folder / "last.pt")  # as if it had been killed in its second epoch
run("--resume", folder)
assert torch.equal(before, weights(folder / "model_epoch_3.pt"))

run("--mode", "test", "--model_path", folder, "--beam_size", 3, "--save_attention_viz", "--attention_viz_samples", 1, "--attention_viz_dpi", 50)
assert {entry["beam_size"] for entry in json.loads((folder / "test_metrics.json").read_text())} == {1, 3}
assert list(folder.glob("attention_viz_sample_*.png"))
run("--mode", "caption", "--model_path", folder, "--images", "tiny/Images", "--output", "captions.csv")
assert len(Path("captions.csv").read_text().splitlines()) == 21
run("--mode", "export", "--model_path", folder, "--output", "shared")
card = Path("shared/README.md").read_text()
assert "3 x 3 regions of 12 numbers; a GRU that attends to them" in card and "no weights worth a licence" in card
assert torch.equal(weights(folder / "best.pt").half().float(), weights(Path("shared/model.safetensors")))
captioner, path = Captioner.load("shared"), Path("shared/model.safetensors")
result = captioner("tiny/Images/p03.jpg", num_captions=2)
facts = load_checkpoint(path)  # the same weights, by PyTorch
for options in ({"beam_size": 4, "num_captions": 4}, {"top_p": 0.9, "num_captions": 3}):
    said = []
    for each in (captioner, Captioner(PyTorchModel(facts, path, "cpu", None), facts, path, 1)):
        each.generator = np.random.default_rng(3)
        said.append([caption for photo in sorted(Path("tiny/Images").iterdir())[:5] for caption in each(photo, **options).captions])
    assert [caption.text for caption in said[0]] == [caption.text for caption in said[1]]
    for one, other in zip(*said, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
        assert one.attention is other.attention is None or np.abs(one.attention - other.attention).max() < 1e-3
assert any(word.attention.shape == (3, 3) for caption in result.captions for word in caption.words)
if importlib.util.find_spec("fastapi"):  # of requirements-serve.txt
    from page_server import ask, serving

    from captioning.modes import serve

    page = serve.build_page(captioner, [], captioner.decoding())
    with serving(serve.build_app(captioner, page, "127.0.0.1", captioner.decoding()), page) as address:
        answer = ask(address, Path("tiny/Images/p03.jpg").read_bytes())
    assert answer.json()["caption"] == result.text
"""


def test_an_encoder_and_a_decoder_from_outside_do_everything(tiny):
    folder = tiny.parent
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)]),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "driver.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
