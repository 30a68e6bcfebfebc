"""One table of flags: what is true of a flag is said once, here.

`FLAGS` says of each flag its default, its range, the modes that read it, whether a resumed run may change it, what a
checkpoint decides, and whether a score may depend on it. captioning/config/settings.py parses by this table; the tables of
runs read it too. Nothing here imports PyTorch, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.config.registry import DECODERS, ENCODERS, LIMITS, is_encoder
from captioning.io import CONTROL_CHARACTERS

MODES = ("train", "test", "tune", "caption", "serve", "export")
DATA_MODES = ("train", "test", "tune")  # modes that read a data set
LIGHT_MODES = ("caption", "serve")  # modes that need no PyTorch, unless the model does
SCHEDULERS = ("reduce_lr_on_plateau", "step", "cosine", "exponential", "one_cycle")


# --------------------------------------------------------------------------------------------------
# Types of values


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Return an argparse type: a finite number within [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not {'a whole' if kind is int else 'a'} number"
            ) from None
        if not finite or value > high or (value <= low if above else value < low):
            ends = [f"{end}" if kind is int else f"{end:g}" for end in (low, high)]
            bounds = f"{'above' if above else 'at least'} {ends[0]}" + (
                f" and at most {ends[1]}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: it must be {bounds}")
        return value

    return parse


def as_text(value: str) -> str:
    """An argparse type: one line of text that can be stored as UTF-8."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: leave the flag out, or give it a value")
    if CONTROL_CHARACTERS.search(value):
        raise argparse.ArgumentTypeError(f"{value[:40]!r} has a line break or another character that no file can keep")
    return value


def as_path(value: str) -> Path:
    """An argparse type: a path that a checkpoint can store."""
    return Path(as_text(value))


def as_encoder(value: str) -> str:
    """An argparse type: the name of an encoder. Whether a library has it is found out when it is built."""
    if not is_encoder(as_text(value)):
        close = difflib.get_close_matches(value, ENCODERS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise argparse.ArgumentTypeError(f"{value[:80]!r} is not an encoder: {hint}--encoder list names them all")
    return value


def as_size(name: str) -> Callable[[str], Any]:
    return number(int, 1, LIMITS[name])


def read_by(name: str) -> str:
    """Return which decoders read a flag, for its help."""
    return f" (decoder {' or '.join(decoder for decoder, entry in DECODERS.items() if name in entry.flags)})"


# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Flag:
    """Everything that is true of one flag."""

    name: str
    help: str
    parse: Callable[[str], Any] | None = None  # None: a switch without a value
    default: Any = None
    choices: tuple[str, ...] = ()
    many: bool = False  # takes several values
    modes: tuple[str, ...] = MODES  # modes that read it
    needs: str = ""  # a flag without which this one has no effect
    resume: bool = False  # may stand beside --resume: where things are and where they run, not what is trained
    checkpoint: str = ""  # 'fixed': a checkpoint decides; 'kept': its value unless given; 'train': the same in training
    parameter: bool = True  # a score may depend on it: `list` and `diff` show it
    metavar: str | None = None

    @property
    def switch(self) -> bool:
        return self.parse is None

    @property
    def place(self) -> bool:
        """Whether it says where something lies on one machine, so that an exported model is without it."""
        return self.parse is as_path or self.name == "feature_cache"


# What a run with --init_from has unless it is given: for some tens to a thousand images (benchmarks/adaptation.py).
ADAPTATION: dict[str, Any] = {
    "dataset_type": "custom", "epochs": 20, "early_stopping": 3, "batch_size": 32, "learning_rate": 0.0003,
    "best_metric": "val_loss", "freq_threshold": 2, "keep_checkpoints": 2,
}  # fmt: skip
# What --init_from does not take from the other model, although a checkpoint decides it elsewhere.
NOT_INHERITED = {
    *ADAPTATION, "data_dir", "image_dir", "captions_file", "seed", "precision", "fine_tune_learning_rate", "replay",
    "replay_data_dir", "feature_cache",
}  # fmt: skip
count, positive, whole = number(int, 1, 10**9), number(float, 0, 1e30, above=True), number(int, 0, 10**9)
weight = number(float, 0, 1e30)
GROUPS: dict[str, tuple[Flag, ...]] = {
    "what to do": (
        Flag("mode", "train a decoder; score a trained one; find its best beam size and length penalty on the validation "
            "images; caption images with it; open a page in the browser that does; write it as a folder to share",
            str, "train", MODES, parameter=False),
        Flag("model_path", "checkpoint, run directory, folder of runs, exported folder, or hf-hub:OWNER/NAME, perhaps with "
            "@REVISION, for one on the Hugging Face hub: to test (several are an ensemble), or to train on from", as_path, many=True, metavar="PATH"),
        Flag("init_from", "start a new run on other data from this model's weights: what --model_path takes. Unless given, "
            + ", ".join(f"{name} is {value:g}" if isinstance(value, float) else f"{name} is {value}" for name, value in ADAPTATION.items()),
            as_path, modes=("train",), metavar="PATH"),
        Flag("predictions", "score the captions in this file (COCO results or CSV) instead of a model's", as_path,
            modes=("test",), parameter=False),
        Flag("output", "--mode export: a new folder; --mode caption: a new .csv or .jsonl, instead of printing", as_path,
            modes=("caption", "export"), parameter=False),
        Flag("resume", "continue an interrupted run in its own directory", as_path, modes=("train",), resume=True,
            parameter=False, metavar="RUN_DIR"),
        Flag("config", "YAML or JSON file of flags, e.g. a run's run_config.json, or a recipe's name, e.g. "
            "flickr8k_attention_cpu; the command line wins", as_path, parameter=False),
        Flag("dry_run", "go through everything on a handful of images in seconds", modes=DATA_MODES, parameter=False),
    ),
    "basic": (
        Flag("dataset_type", "custom is your own folder, demo the drawn set of download_datasets.py", str, "flickr30k",
            ("flickr8k", "flickr30k", "coco", "custom", "demo"), modes=DATA_MODES, checkpoint="fixed"),
        Flag("decoder", "attention is the best on Flickr8k; all but lstm show where they look; show_attend_tell is the paper's, and "
            "slow", str, "lstm", tuple(DECODERS), modes=DATA_MODES, checkpoint="fixed"),
        Flag("epochs", "epochs to train; with --model_path, epochs more", number(int, 0, LIMITS["epochs"]), 10,
            modes=("train",)),
        Flag("batch_size", "captions in a batch (whole images; fewer if memory runs out)", as_size("batch_size"), 128,
            modes=("train",), checkpoint="train"),
        Flag("learning_rate", "initial rate; the peak for one_cycle. 1e-3 suits Flickr8k", positive, 0.0001,
            modes=("train",), checkpoint="train"),
    ),
    "data": (
        Flag("data_dir", "data set folder (default: data/<dataset_type>)", as_path, modes=(*DATA_MODES, "serve"),
            resume=True, checkpoint="kept"),
        Flag("image_dir", "folder of the images, where it is not found", as_path, modes=(*DATA_MODES, "serve"),
            resume=True, checkpoint="kept"),
        Flag("captions_file", "captions file, where it is not found", as_path, modes=(*DATA_MODES, "serve"), resume=True,
            checkpoint="kept"),
        Flag("generated_captions", "read also captions that --sidecar wrote beside the photos", modes=DATA_MODES,
            checkpoint="kept"),
        Flag("freq_threshold", "a word seen less often in the training captions becomes <UNK>", as_size("freq_threshold"), 3,
            modes=DATA_MODES, checkpoint="fixed"),
        Flag("max_length", "most words in a caption, read or written", as_size("max_length"), 40, modes=DATA_MODES,
            checkpoint="fixed"),
        Flag("num_workers", "threads that decode images; capped at the cores", whole, 16, modes=(*DATA_MODES, "caption"),
            resume=True, parameter=False),
        Flag("views", "of each image: one is drawn for each training step, all are averaged in testing; each is "
            "encoded once", str, "whole", ("whole", "mirror", "all"), modes=DATA_MODES, checkpoint="kept"),
        Flag("feature_cache", "folder of encoded images; 'off' encodes them in every batch", as_text, "feature_cache",
            modes=DATA_MODES, resume=True, checkpoint="kept", parameter=False),
    ),
    "model": (
        Flag("encoder", "frozen image encoder: resnet50, efficientnet_lite0 (needs no download) and others, or any of "
            "timm's: timm:NAME, timm:hf-hub:OWNER/NAME, timm:local-dir:FOLDER; 'list' or 'list PATTERN' prints names, "
            "licences and sizes", as_encoder, "resnet50", modes=DATA_MODES, checkpoint="fixed", metavar="NAME"),
        Flag("grid", "average the encoder's grid to N x N regions (timm's encoders)", as_size("grid"), modes=DATA_MODES,
            checkpoint="fixed", metavar="N"),
        Flag("fine_tune", "train the encoder's last N stages with the decoder; 0 leaves all of it frozen",
            number(int, 0, LIMITS["fine_tune"]), 0, modes=DATA_MODES, checkpoint="fixed", metavar="N"),
        Flag("fine_tune_learning_rate", "peak rate of these stages; it follows the schedule of --learning_rate (default: "
            "0.3 of it); without --init_from they are not trained in the first epoch", positive, modes=("train",), needs="fine_tune", checkpoint="train"),
        Flag("resnet_weights", "file of the encoder's weights, or 'random'; by default looked for, then downloaded",
            as_text, resume=True),
        Flag("embed_size", "size of word and image embeddings", as_size("embed_size"), 512, modes=DATA_MODES,
            checkpoint="fixed"),
        Flag("hidden_size", "LSTM size, 512 with one layer suits Flickr8k and a laptop; of a transformer, whose width is "
            "--embed_size, the size within its feed-forward layers", as_size("hidden_size"), 1024,
            modes=DATA_MODES, checkpoint="fixed"),
        Flag("num_layers", f"layers{read_by('num_layers')}", as_size("num_layers"), 3, modes=DATA_MODES, checkpoint="fixed"),
        Flag("num_heads", f"attention heads{read_by('num_heads')}", as_size("num_heads"), 8, modes=DATA_MODES,
            checkpoint="fixed"),
        Flag("attention_dim", f"size of queries and keys{read_by('attention_dim')}", as_size("attention_dim"), 512,
            modes=DATA_MODES, checkpoint="fixed"),
        Flag("drop_prob", "dropout; more for small data sets", number(float, 0, 0.95), 0.3, modes=("train",),
            checkpoint="train"),
    ),
    "training": (
        Flag("seed", "of the split that is drawn, weights, order, dropout, and what --top_p draws",
            number(int, 0, LIMITS["seed"]), 0, modes=(*DATA_MODES, "caption"), checkpoint="kept"),
        Flag("device", "where the networks run", str, "auto", ("auto", "cpu", "cuda", "mps"), resume=True,
            parameter=False),
        Flag("precision", "matmul dtype in training; auto is bf16 where the device is made for it, else fp32", str,
            "auto", ("auto", "fp32", "bf16", "fp16"), modes=("train",), checkpoint="train"),
        Flag("features_on_device", "keep all image features in the GPU's memory; auto does if they take at most half of "
            "what is free", str, "auto", ("auto", "on", "off"), modes=DATA_MODES, resume=True, parameter=False),
        Flag("grad_clip", "largest gradient norm; 0 does not clip", weight, 5.0, modes=("train",), checkpoint="train"),
        Flag("weight_decay", "of AdamW", weight, 0.01, modes=("train",), checkpoint="train"),
        Flag("label_smoothing", "of the training loss; 0.1 helps long runs", number(float, 0, 0.9), 0.0,
            modes=("train",), checkpoint="train"),
        Flag("attention_reg", "weight of Show-Attend-and-Tell's doubly stochastic term; 1 with show_attend_tell unless given"
            f"{read_by('attention_reg')}", weight, 0.0,
            modes=("train",), checkpoint="train"),
        Flag("best_metric", "what picks best.pt: val_loss jumps less from epoch to epoch, and suits --fine_tune",
            str, "cider",
            ("cider", "bleu4", "val_loss"), modes=("train",), checkpoint="train"),
        Flag("replay", "share of each epoch's captions that are of images which the model of --init_from was trained on, so "
            "that it forgets less", number(float, 0, 0.9), 0.0, modes=("train",), needs="init_from", checkpoint="train"),
        Flag("replay_data_dir", "data set folder of these images (default: where that model's data were)", as_path,
            modes=("train",), needs="replay", resume=True, checkpoint="train", parameter=False),
        Flag("early_stopping", "stop after so many epochs without a new best; 0 never", whole, 0, modes=("train",)),
    ),
    "self-critical training": (
        Flag("scst_epochs", "self-critical epochs after the others: sampled captions, rewarded by CIDEr-D; "
            "--epochs 0 --model_path X adds only these", number(int, 0, LIMITS["epochs"]), 0, modes=("train",)),
        Flag("scst_learning_rate", "initial rate; half a cosine takes it to zero", positive, 2e-4, modes=("train",),
            needs="scst_epochs"),
        Flag("scst_samples", "captions sampled for each image", number(int, 2, 1000), 5, modes=("train",),
            needs="scst_epochs"),
        Flag("scst_ce_weight", "weight of the cross-entropy of the references in the loss", weight, 0.05,
            modes=("train",), needs="scst_epochs"),
    ),
    "learning rate scheduling": (
        Flag("use_scheduler", "let the learning rate follow a schedule", modes=("train",)),
        Flag("scheduler_type", "which one", str, "reduce_lr_on_plateau", SCHEDULERS, modes=("train",),
            needs="use_scheduler"),
        Flag("scheduler_patience", "reduce_lr_on_plateau: epochs without improvement", whole, 3, modes=("train",),
            needs="use_scheduler"),
        Flag("scheduler_factor", "reduce_lr_on_plateau: factor", number(float, 0, 0.999, above=True), 0.5,
            modes=("train",), needs="use_scheduler"),
        Flag("scheduler_step_size", "step: epochs between two drops", count, 7, modes=("train",), needs="use_scheduler"),
        Flag("scheduler_gamma", "step: factor of a drop; exponential: factor of an epoch (unless given: a tenth over "
            "the whole run)", number(float, 0, 1, above=True), 0.1, modes=("train",), needs="use_scheduler"),
        Flag("scheduler_t_max", "cosine: epochs from the top to min_lr, where it stays", count, 10, modes=("train",),
            needs="use_scheduler"),
        Flag("min_lr", "no schedule goes below it", weight, 1e-7, modes=("train",), needs="use_scheduler"),
        Flag("warmup_epochs", "one_cycle: epochs of its rising part", whole, 0, modes=("train",), needs="use_scheduler"),
    ),
    "decoding": (
        Flag("beam_size", "hypotheses kept by the search (unless given: 20 with consensus, else what --mode tune found)",
            as_size("beam_size"), 3),
        Flag("length_penalty", "exponent of the length; more makes captions longer", number(float, 0, LIMITS["length_penalty"]), 0.7),
        Flag("no_repeat_ngram", "no caption has the same N words twice; 0 for no such rule", number(int, 0, 10), 3,
            modes=("test", "tune", "caption", "serve")),
        Flag("consensus", "take, of a beam of 20 unless --beam_size is given, the caption that agrees best with the others and with "
            "what the checkpoint expects of the image; has no effect where it expects nothing (--mode tune adds it to older runs)",
            str, "on", ("on", "off"), modes=("test", "caption", "serve")),
        Flag("split", "which images are scored; all needs no lists", str, "test", ("test", "val", "val+test", "all"), modes=("test",),
            parameter=False),
    ),
    "captioning and the page": (
        Flag("images", "files, folders, patterns; - for a list of them on standard input", str, many=True,
            modes=("caption",), parameter=False, metavar="IMAGE"),
        Flag("num_captions", "different captions of each image, best first", number(int, 1, LIMITS["beam_size"]), 1,
            modes=("caption",), parameter=False),
        Flag("top_p", "sample captions from the most probable words that together have this probability, e.g. 0.9: more "
            "varied than the beam's", number(float, 0, 1, above=True), modes=("caption",), parameter=False),
        Flag("min_confidence", "print no caption for an image whose best caption has a lower confidence, which is the share of its "
            "content words that is expected to be right", number(float, 0, 1), modes=("caption",), parameter=False, metavar="SHARE"),
        Flag("json", "print JSON lines, which say more, instead of path<TAB>caption<TAB>confidence", modes=("caption",),
            parameter=False),
        Flag("sidecar", "write each caption beside its photo: photo.txt, as LoRA trainers read it, or photo.jpg.xmp, as photo "
            "programs do; a person's text stays", str, choices=("txt", "xmp"), modes=("caption",), parameter=False),
        Flag("prefix", "first words of each photo.txt, e.g. a trigger word", as_text, modes=("caption",), needs="sidecar",
            parameter=False, metavar="WORDS"),
        Flag("host", "address that the page listens on; 0.0.0.0 lets the whole network in", as_text, "127.0.0.1",
            modes=("serve",), parameter=False),
        Flag("port", "port of the page (default: the first free one from 7860 on)", number(int, 1, 65535),
            modes=("serve",), parameter=False),
    ),
    "attention visualization": (
        Flag("save_attention_viz", f"save attention pictures{read_by('save_attention_viz')}", modes=(*DATA_MODES, "caption"),
            parameter=False),
        Flag("attention_viz_samples", "how many test images to draw", count, 3, modes=DATA_MODES,
            needs="save_attention_viz", parameter=False),
        Flag("attention_viz_images", "draw these images of the data set, e.g. dog.jpg", as_text, many=True,
            modes=DATA_MODES, needs="save_attention_viz", parameter=False, metavar="NAME"),
        Flag("advanced_attention_viz", "also the picture with several panels", modes=(*DATA_MODES, "caption"),
            needs="save_attention_viz", parameter=False),
        Flag("attention_viz_format", "svg and pdf are for papers", str, "png", ("png", "svg", "pdf"),
            modes=(*DATA_MODES, "caption"), needs="save_attention_viz", parameter=False),
        Flag("attention_viz_dpi", "dots per inch of a png, and of the photos in an svg or pdf", number(int, 50, 600),
            120, modes=(*DATA_MODES, "caption"), needs="save_attention_viz", parameter=False),
    ),
    "output": (
        Flag("checkpoint_minutes", "minutes between two saves of last.pt within an epoch", positive, 10.0,
            modes=("train",), resume=True, parameter=False),
        Flag("model_save_dir", "where run directories are made", as_path, Path("saved_models"), modes=("train",),
            parameter=False),
        Flag("keep_checkpoints", "keep the newest N epochs (and best, last); 0 keeps all", whole, 0, modes=("train",),
            parameter=False),
        Flag("tensorboard", "log curves, captions and attention for TensorBoard, every epoch", modes=("train",),
            resume=True, parameter=False),
        Flag("quiet", "print only warnings, one line per epoch and the final result", resume=True, parameter=False),
        Flag("verbose", "print also where the time of each epoch goes", resume=True, parameter=False),
    ),
}  # fmt: skip
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}
DEFAULTS: dict[str, Any] = {name: False if flag.switch else flag.default for name, flag in FLAGS.items()}
CONSENSUS_BEAM = 20  # hypotheses, unless --beam_size is given: consensus needs many captions to choose from


def chosen_beam(given: Collection[str], tuned: Mapping[str, Any] | None, consensus: bool) -> dict[str, Any]:
    """Return the beam size and length penalty that a checkpoint decides.

    Args:
        given: names of the options that were given, which it does not decide.
        tuned: what `--mode tune` found for it.
        consensus: whether captions are found by consensus.
    """
    found: dict[str, Any] = {}
    if tuned:
        found |= {name: tuned[name] for name in ("beam_size", "length_penalty") if name not in given}
    if consensus and "beam_size" not in given:
        found["beam_size"] = CONSENSUS_BEAM
    return found


# Keys of run_config.json that are facts of a run, and flags that say what to do: of a file that the program wrote `--config`
# passes over all of them.
FACTS, TASK = ("timestamp", "command", "explicit"), ("mode", "model_path", "config", "resume", "output")
NOT_CONFIGURABLE = (*FACTS, *TASK)
CONFIG_NAMES = {"decoder": "decoder_type"}  # flags under the names that the original's run_config.json has
