"""`--fine_tune`: the encoder's last stages are trained with the decoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import round_to_float16
from run_files import assert_room, only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config import registry
from captioning.encoders.base import TrainableStages, find_encoder
from captioning.io import UserError
from captioning.runs.checkpoints import load_checkpoint


@pytest.mark.parametrize("name", registry.ENCODERS)
def test_an_encoder_has_the_stages_that_it_declares(name):
    spec = find_encoder(name)
    with torch.device("meta"):
        shapes, grid = [], torch.zeros(1, 3, spec.image_size, spec.image_size)
        for stage in spec.load_stages(None):
            grid = stage(grid)
            shapes.append(tuple(grid.shape[1:3]))
    assert shapes == [*spec.earlier, (spec.channels, spec.grid)]


@pytest.mark.parametrize("name, stages", [("efficientnet_lite0", 1), ("efficientnet_lite0", 4), ("resnet50", 2)])
def test_frozen_and_trained_stages_together_are_the_encoder(name, stages):
    spec = find_encoder(name)
    weights, _ = spec.find_weights("random")  # which the packaged ones do not read
    before = spec.without_last(stages)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8))
    trained = TrainableStages(before, weights)
    with torch.no_grad():
        whole, regions = spec.build(weights)(pixels), before.build(weights)(pixels)
        assert (trained(regions) - whole).norm() < 1e-4 * whole.norm()
    assert regions.shape[1] == before.grid**2 and before.transform == f"squash224-cut{stages}"
    assert all(tensor.dtype == torch.float32 for tensor in trained.state_dict().values())
    assert not trained.train().training and all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("name, stages", [("efficientnet_lite0", 5), ("resnet50", 4)])
def test_encoders_that_cannot_be_cut_there(name, stages):
    with pytest.raises(
        UserError,
        match=f"--fine_tune {stages}: {name} has (3|4) last stages that can be trained: give at most",
    ):
        find_encoder(name).without_last(stages)


def stages_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_checkpoint(path)["decoder"].items() if name.startswith("stages.")}


def test_the_stages_learn_from_the_second_epoch_on(without_graphs, tiny, monkeypatch, capsys):
    """In cross-entropy and self-critical training; then they test, caption and train on."""
    skip_pictures(monkeypatch)
    monkeypatch.chdir(tiny.parent)
    flags = "--dataset_type custom --data_dir tiny --encoder efficientnet_lite0 --decoder attention --fine_tune 1"
    flags += " --epochs 2 --scst_epochs 1 --embed_size 16 --hidden_size 16 --num_layers 1 --freq_threshold 1"
    flags += " --max_length 12 --learning_rate 0.02 --batch_size 16"
    assert trainer.main(flags.split()) == 0
    folder = only_run()
    assert "_ft1_" in folder.name
    assert_room(capsys.readouterr().out, folder)
    spec = find_encoder("efficientnet_lite0")
    pretrained = TrainableStages(spec.without_last(1), spec.find_weights()[0]).state_dict()
    first, second, third = (stages_of(folder / f"model_epoch_{epoch}.pt") for epoch in (1, 2, 3))
    assert first and all(torch.equal(first[f"stages.{name}"], tensor) for name, tensor in pretrained.items())
    for before, after in ((first, second), (second, third)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and moved == {name for name in before if "running" not in name}
    round_to_float16(folder / "best.pt")
    assert trainer.main(["--mode", "test", "--model_path", str(folder), "--beam_size", "2"]) == 0
    assert trainer.main(["--mode", "export", "--model_path", str(folder), "--output", "shared"]) == 0
    card = Path("shared/README.md").read_text()
    assert "of its last stages one that was trained" in card
    more = ["--model_path", str(folder), "--epochs", "1"]
    assert trainer.main([*more, "--fine_tune_learning_rate", "0.001", "--model_save_dir", "more"]) == 0
    (last,) = Path("more").rglob("last.pt")
    assert load_checkpoint(last)["flags"]["fine_tune_learning_rate"] == 0.001
    adapted = ["--init_from", str(folder), "--data_dir", "tiny", "--epochs", "1", "--model_save_dir", "adapted"]
    assert trainer.main(adapted) == 0
    assert_room(capsys.readouterr().out, only_run("adapted"))
    before, after = stages_of(folder / "best.pt"), stages_of(only_run("adapted") / "last.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "running" not in name}, "with a trained decoder they learn at once"
    assert trainer.main([*more, "--fine_tune", "2"]) == 2
    assert "--fine_tune 2 contradicts" in capsys.readouterr().err
