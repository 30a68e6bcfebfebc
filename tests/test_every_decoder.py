"""Each decoder, on an encoder that is frozen and one whose last stage was trained: captions by consensus, and ONNX."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_targets import sound_checkpoint

from captioning.captioner import Captioner
from captioning.config import registry
from captioning.decoders.base import build_decoder, find_decoder, group_sizes
from captioning.encoders import base as encoders
from captioning.modes.export import export
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
DOG = 5  # the last of the checkpoint's words


class TwoStages(encoders.EncoderSpec):
    """A small encoder with a stage that can be trained."""

    def locate_weights(self, named, expected):
        return None, "0676ba61"

    def load_stages(self, weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [torch.nn.Conv2d(3, 6, 4, 4), torch.nn.Conv2d(6, 4, 2, 2)]


SPEC = TwoStages("resnet50", 4, (0.0,) * 3, (255.0,) * 3, image_size=56, earlier=((6, 14),))


def head_for_dogs() -> dict:
    """A regression that expects the word "dog" of every image, and leaves the beam no say."""
    project, expect = torch.zeros(5, 1), torch.zeros(1, 2)
    project[-1] = expect[0, 1] = 1.0  # the last entry of what the regression reads is a one
    return {
        "keys": torch.tensor([4, DOG]), "idf": torch.ones(2), "sizes": torch.tensor([2, 0, 0, 0]), "centre": torch.zeros(4),
        "project": project, "expect": expect, "log_images": math.log(100), "weight": 128.0,
    }  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch, name, stages) -> Path:
    monkeypatch.setitem(registry.ENCODERS, "resnet50", registry.Entry("test_every_decoder:SPEC"))
    checkpoint = sound_checkpoint.__wrapped__(name)
    flags, spec = checkpoint["flags"] | {"fine_tune": stages}, SPEC.without_last(stages)
    torch.manual_seed(0)
    decoder = build_decoder(flags, len(checkpoint["vocabulary"]), spec)
    parameters = iter(decoder.parameters())
    groups = [
        {"params": [next(parameters) for _ in range(size)], "betas": tuple([0.9, 0.999])}
        for size in group_sizes(decoder)
    ]  # no tuple of two groups, which a checkpoint cannot have
    checkpoint |= {
        "flags": flags, "decoder": dict(decoder.state_dict()), "optimizer": torch.optim.AdamW(groups, fused=True).state_dict(),
        "encoder": checkpoint["encoder"] | {"transform": spec.transform}, "consensus": head_for_dogs(),
    }  # fmt: skip
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    return tmp_path / "best.pt"


@pytest.mark.parametrize("name", registry.DECODERS)
@pytest.mark.parametrize("stages", [0, 1])
def test_captions_by_consensus_from_a_checkpoint_and_an_export(model, tmp_path, name):
    export(load_checkpoint(model), model, tmp_path / "model", False, None)
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for path in (model, tmp_path / "model"):
        captioner = Captioner.load(path)
        found = captioner(photo, beam_size=6, num_captions=6)
        plain = captioner(photo, beam_size=6, num_captions=6, consensus="off")
        dogs = [each.text.split().count("dog") / max(1, len(each.words)) for each in found.captions]
        assert dogs[0] == max(dogs) > min(dogs)
        assert {each.text for each in found.captions} & {each.text for each in plain.captions}
        for word in found.words:
            assert (word.attention is not None) == find_decoder(name).has_attention
            assert word.attention is None or (
                word.attention.shape == (7, 7) and word.attention.sum() == pytest.approx(1)
            )


@pytest.mark.skipif(not ONNX, reason="ONNX is not installed")
@pytest.mark.parametrize("name, stages", [("lstm", 1)])
def test_trained_stages_are_a_part_of_the_decoders_network(model, tmp_path, name):
    export(load_checkpoint(model), model, tmp_path / "model", True, None)
    import onnxruntime

    begin = onnxruntime.InferenceSession(tmp_path / "model" / "decoder_begin.onnx")
    regions = np.random.default_rng(0).random((3, 196, 6), dtype=np.float32)  # of the frozen stage
    outcome = dict(
        zip([each.name for each in begin.get_outputs()], begin.run(None, {"features": regions}), strict=True)
    )
    captioner = Captioner.load(model)
    with torch.no_grad():
        state = captioner.decoder.eval().begin(torch.from_numpy(regions))
    for field, values in outcome.items():
        np.testing.assert_allclose(values, getattr(state, field), atol=1e-4)
