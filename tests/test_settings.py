"""The table of flags, --config, and what a checkpoint decides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.flags import FLAGS, MODES
from captioning.config.settings import parse_flags
from captioning.io import UserError

SCRIPT = Path(trainer.__file__)
TEST = ["--mode", "test", "--model_path", "x"]
CAPTION = ["--mode", "caption", "--model_path", "x", "--images", "y"]


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_flags(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_help_through_the_command_shows_every_default():
    ended = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    shown = " ".join(ended.stdout.split())
    for flag in FLAGS.values():
        assert f"--{flag.name}" in shown
        if flag.default is not None and not flag.switch:
            value = f"{flag.default:g}" if isinstance(flag.default, float) else str(flag.default)
            assert f"(default: {value})" in shown, flag.name


def test_the_originals_defaults():
    settings = parse_flags([])
    original = {
        "dataset_type": "flickr30k", "decoder": "lstm", "epochs": 10, "batch_size": 128, "learning_rate": 1e-4,
        "scheduler_type": "reduce_lr_on_plateau", "scheduler_patience": 3, "scheduler_factor": 0.5,
        "scheduler_step_size": 7, "scheduler_gamma": 0.1, "scheduler_t_max": 10, "min_lr": 1e-7, "warmup_epochs": 0,
        "attention_viz_samples": 3, "embed_size": 512, "hidden_size": 1024, "num_layers": 3, "attention_dim": 512,
        "drop_prob": 0.3, "num_workers": 16, "use_scheduler": False, "save_attention_viz": False,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in original} == original and not settings.explicit


def test_a_new_flag_is_a_decision():
    """Add it here, in alphabetical order, when it is worth a line of `--help` and of docs/flags.md."""
    flags = """
        advanced_attention_viz attention_dim attention_reg attention_viz_dpi attention_viz_format attention_viz_images
        attention_viz_samples batch_size beam_size best_metric captions_file checkpoint_minutes config consensus
        data_dir dataset_type decoder device drop_prob dry_run early_stopping embed_size encoder epochs feature_cache
        features_on_device fine_tune fine_tune_learning_rate freq_threshold generated_captions grad_clip grid hidden_size host
        image_dir images init_from json keep_checkpoints label_smoothing learning_rate length_penalty max_length
        min_confidence min_lr mode model_path model_save_dir no_repeat_ngram num_captions num_heads num_layers
        num_workers output port precision predictions prefix quiet replay replay_data_dir resnet_weights resume
        save_attention_viz scheduler_factor scheduler_gamma scheduler_patience scheduler_step_size scheduler_t_max
        scheduler_type scst_ce_weight scst_epochs scst_learning_rate scst_samples seed sidecar split tensorboard top_p
        use_scheduler verbose views warmup_epochs weight_decay
    """
    assert sorted(FLAGS) == flags.split()


def test_the_table_is_sound():
    for flag in FLAGS.values():
        assert set(flag.modes) <= set(MODES) and flag.checkpoint in ("", "fixed", "kept", "train")
        assert not flag.needs or flag.needs in FLAGS
        if flag.default is not None and flag.parse is not None and not flag.many:
            assert flag.parse(str(flag.default)) == flag.default and flag.default in (flag.choices or (flag.default,))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epohcs", "3"], "did you mean --epochs?"),
        (["--images", "x.jpg"], "--images has no effect with --mode train, only with caption"),
        ([*TEST, "--epochs", "3"], "--epochs has no effect with --mode test"),
        (["--attention_dim", "64"], "--attention_dim has no effect with --decoder lstm: add --decoder attention"),
        (["--encoder", "efficientnet_lite0", "--resnet_weights", "x"], "--resnet_weights has no effect with --encoder"),
        (["--scheduler_gamma", "0.5"], "--scheduler_gamma has no effect without --use_scheduler"),
        (["--fine_tune_learning_rate", "1e-4"], "--fine_tune_learning_rate has no effect without --fine_tune"),
        (["--scst_samples", "3"], "--scst_samples has no effect without --scst_epochs"),
        (["--seed", "9223372036854775808"], "--seed: 9223372036854775808 is out of range"),
        (["--data_dir", "a\nb"], "a line break"),
        (["--feature_cache", ""], "it is empty"),
        (["--length_penalty", "200"], "out of range"),
        (["--max_length", "1000000"], "out of range"),
        (["--decoder", "transformer", "--num_heads", "7"], "--embed_size 512 cannot be divided among --num_heads 7"),
        (["--decoder", "show_attend_tell", "--num_layers", "2"], "add --decoder lstm or attention or transformer"),
        (["--decoder", "lstm", "--save_attention_viz"], "no effect with --decoder lstm"),
        (["--learning_rate", "nan"], "out of range"),
        (["--batch_size", "0"], "at least 1"),
        (["--epochs", "0"], "leaves nothing to do"),
        (["--quiet", "--verbose"], "contradict"),
        (["--scst_epochs", "1", "--early_stopping", "2"], "no effect with --scst_epochs"),
        (["--predictions", "x.json"], "no effect with --mode train, only with test"),
        (["--consensus", "on"], "no effect with --mode train, only with test"),
        (["--model_path", "a.pt", "b.pt"], "takes one --model_path"),
        (["--output", "x"], "--output has no effect with --mode train, only with caption or export"),
        (["--init_from", "a", "--model_path", "b"], "--init_from starts a new run"),
        (["--replay", "0.2"], "no effect without --init_from"),
        (["--init_from", "a", "--replay_data_dir", "b"], "no effect without --replay"),
        (["--init_from", "a", "--replay", "1"], "at most 0.9"),
        (["--resume", "a", "--init_from", "b"], "no effect with --resume"),
        (["--mode", "tune"], "needs --model_path"),
        (["--mode", "export", "--model_path", "x"], "--mode export needs --output"),
        ([*TEST, "--init_from", "a"], "no effect with --mode test"),
        ([*TEST, "--consensus", "on", "--beam_size", "1"], "above 1"),
        (["--mode", "test", "--predictions", "a.csv", "--consensus", "on"], "captions already"),
        (["--mode", "caption"], "needs --images"),
        (["--mode", "caption", "--images"], "expected at least one argument"),
        ([*CAPTION, "--port", "8000"], "--port has no effect with"),
        ([*CAPTION, "--num_captions", "4", "--beam_size", "3"], "needs a --beam_size of at least as many"),
        ([*CAPTION, "--prefix", "a"], "--prefix has no effect without --sidecar"),
        ([*CAPTION, "--sidecar", "xmp", "--prefix", "a"], "--prefix has no effect with --sidecar xmp"),
        ([*CAPTION, "--json", "--output", "y.jsonl"], "--json has no effect with --output"),
        ([*CAPTION, "--min_confidence", "0.5", "--top_p", "0.9"], "--min_confidence has no effect with --top_p"),
        ([*CAPTION, "--consensus", "on", "--top_p", "0.9"], "--consensus has no effect with --top_p"),
        *(([*CAPTION, "--min_confidence", wrong], "--min_confidence: ") for wrong in ("1.5", "-1", "nan")),
    ],
)
def test_what_is_refused_before_anything_is_read(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_a_hand_written_config_counts_as_explicit(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 4\nbatch_size: 32\nuse_scheduler: false\n")
    settings = parse_flags(["--config", str(file), "--epochs", "2"])
    assert (settings.epochs, settings.batch_size) == (2, 32) and settings.explicit >= {"epochs", "batch_size"}
    assert "use_scheduler" not in settings.explicit  # `false` in a file is the same as leaving the switch out


def test_a_hand_written_config_says_what_to_do(tmp_path, capsys):
    """The mode, the model and the output were dropped, and something else was trained."""
    file = tmp_path / "own.yaml"
    file.write_text("mode: caption\nmodel_path: [RUN]\nimages: [a.jpg]\noutput: x.csv\n")
    settings = parse_flags(["--config", str(file)])
    assert (settings.mode, settings.model_path, settings.output) == ("caption", [Path("RUN")], Path("x.csv"))
    assert parse_flags(["--config", str(file), "--output", "y.csv"]).output == Path("y.csv")
    file.write_text("resume: nowhere\nquiet: true\n")
    with pytest.raises(UserError, match="--resume nowhere is not a run directory"):
        parse_flags(["--config", str(file)])
    file.write_text("resume: nowhere\nepochs: 3\n")
    assert "--epochs has no effect with --resume" in refused(capsys, "--config", str(file))
    run = tmp_path / "run_config.json"
    run.write_text(json.dumps({"data_dir": "old", "timestamp": "t"}))
    file.write_text(f"resume: {tmp_path}\ndata_dir: other\n")  # the run went on with its old data
    assert "data_dir" in parse_flags(["--config", str(file)]).explicit
    file.write_text("config: other.yaml\n")
    assert "cannot name another" in refused(capsys, "--config", str(file))
    run.write_text(json.dumps({"mode": "train", "model_path": "old/best.pt", "epochs": 3, "timestamp": "t"}))
    assert parse_flags(["--config", str(run)]).model_path is None
    assert "not taken from it: model_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, values",
    [
        ("feature_cache: off", {"feature_cache": "off"}),
        ("features_on_device: on", {"features_on_device": "on"}),
        ("mode: test\nmodel_path: [x]\nconsensus: off", {"consensus": "off"}),
        ("seed: 010", "seed.*010 begins with a 0|010 begins with a 0"),
        ("epochs: 3\nepochs: 4", "epochs is given twice"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks(tmp_path, text, values):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    if isinstance(values, str):
        with pytest.raises(UserError, match=values):
            parse_flags(["--config", str(file)])
    else:
        settings = parse_flags(["--config", str(file)])
        assert {name: getattr(settings, name) for name in values} == values


def test_a_run_config_records_what_was_explicit(tmp_path):
    file = tmp_path / "run_config.json"
    content = {"decoder_type": "attention", "epochs": 10, "batch_size": 64, "timestamp": "t", "command": "python x"}
    file.write_text(json.dumps(content | {"explicit": ["epochs"]}))
    assert parse_flags(["--config", str(file)]).explicit == {"config", "epochs"}
    file.write_text(json.dumps(content))  # as the original writes it: every flag counts
    settings = parse_flags(["--config", str(file)])
    assert settings.explicit == {"config", "decoder", "epochs", "batch_size"} and settings.decoder == "attention"


def test_a_checkpoint_decides_and_only_explicit_flags_contradict_it(tmp_path):
    first = parse_flags(["--decoder", "attention", "--encoder", "efficientnet_lite0", "--weight_decay", "0.05"])
    checkpoint = {"flags": first.stored() | {"precision": "fp32"}, "consensus": None, "decoding": None}
    source = Path("x.pt")
    later = parse_flags(["--model_path", "x.pt", "--batch_size", "32"]).with_checkpoint(checkpoint, source)
    assert (later.decoder, later.batch_size, later.weight_decay) == ("attention", 32, 0.05)
    for flag, message in (
        ("--hidden_size 99", "--hidden_size 99 contradicts x.pt"),
        ("--num_heads 4", "--num_heads has no effect with x.pt, whose decoder is attention"),
        ("--resnet_weights a.pth", "--resnet_weights has no effect with x.pt, whose encoder is efficientnet_lite0"),
    ):
        with pytest.raises(UserError, match=message):
            parse_flags(["--model_path", "x.pt", *flag.split()]).with_checkpoint(checkpoint, source)


def test_a_decoder_has_defaults_of_its_own(tmp_path):
    file = tmp_path / "run_config.json"
    file.write_text(json.dumps({"decoder_type": "show_attend_tell", "epochs": 4, "explicit": ["epochs"]}))
    of_file = ["--config", str(file)]
    assert parse_flags(of_file).attention_reg == parse_flags(["--decoder", "show_attend_tell"]).attention_reg == 1
    assert parse_flags([*of_file, "--attention_reg", "0.5"]).attention_reg == 0.5
    assert parse_flags([*of_file, "--decoder", "attention"]).attention_reg == 0
    assert "attention_reg" not in parse_flags(of_file).explicit


def test_tuned_decoding_counts_unless_flags_say_otherwise():
    tuned = {"beam_size": 5, "length_penalty": 1.0}
    checkpoint = {"flags": parse_flags([]).stored(), "consensus": None, "decoding": tuned}

    def beam(*argv: str) -> int:
        settings = parse_flags(["--mode", "test", "--model_path", "x.pt", *argv])
        return int(settings.with_checkpoint(checkpoint, Path("x.pt")).beam_size)

    assert beam() == 5 and beam("--beam_size", "2") == 2
    assert beam("--length_penalty", "0.3") == 5, "each of the two is kept by itself"


def test_a_folder_of_runs_names_the_newest_interrupted_one(tmp_path):
    for name, finished in (("a_20260101_000000", False), ("b_20260102_000000", False), ("c_20260103_000000", True)):
        (tmp_path / name).mkdir()
        for file in ("run_config.json", "last.pt", *(["run_summary.txt"] if finished else [])):
            (tmp_path / name / file).touch()
    with pytest.raises(UserError, match=f"newest interrupted run below it: python .* --resume {tmp_path}/b_2026"):
        parse_flags(["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 5000, "--config .* as YAML"),
        ("- 3", "not a mapping of flags"),
        ("epochs: !!bool x", "--config .* as YAML"),
        ("epochs: !!python/name:os.system x", "could not determine a constructor"),
        ("a: &x 1\nepochs: *x\n", "aliases are not allowed"),  # nested ones take minutes, and so do merge keys
        ("<<: {<<: {epochs: 3}}\n", "merge keys are not allowed"),
        ("epochs: 3  #" + "x" * 200_000, "larger than"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse_flags(["--config", str(tmp_path / "x.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("feature_cache: [a]", "feature_cache: expected a number or a text"),
        ("use_scheduler: 'no'", "use_scheduler: expected true or false"),
        ("epochs: true", "epochs: expected a number or a text"),
        ("epochs: " + "9" * 400, "epochs: "),
        ("help: true", "unknown flag 'help'"),
        ("scheduler_gamma: 0.5", "--scheduler_gamma has no effect without"),
        ("batch_sise: 32", "did you mean batch_size?"),
    ],
)
def test_values_of_a_config_that_no_flag_takes(tmp_path, capsys, text, message):
    (tmp_path / "x.yaml").write_text(text)
    assert message in refused(capsys, "--config", str(tmp_path / "x.yaml"))
