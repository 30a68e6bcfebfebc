"""What the flags mean together: which belong to what, and which would have no effect."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from captioning import registry

SCHEDULERS = ("reduce_lr_on_plateau", "step", "cosine", "exponential", "one_cycle")
SCHEDULER_FLAGS = (
    "scheduler_type", "scheduler_patience", "scheduler_factor", "scheduler_step_size", "scheduler_gamma",
    "scheduler_t_max", "min_lr", "warmup_epochs",
)  # fmt: skip
# What a checkpoint decides; typing one of these with another value beside --model_path is an error.
ARCHITECTURE_FLAGS = (
    "decoder", "encoder", "dataset_type", "embed_size", "hidden_size", "num_layers", "attention_dim",
    "freq_threshold", "max_length",
)  # fmt: skip
ENCODER_NAMES = tuple(registry.ENCODERS)
# What may be typed beside --resume: where things are and where they run, not what is trained.
RESUME_FLAGS = (
    "resume", "device", "num_workers", "compile", "features_on_device", "feature_cache", "checkpoint_minutes",
    "data_dir", "image_dir", "captions_file", "resnet_weights", "tensorboard", "quiet", "verbose",
)  # fmt: skip
# Flags of some modes alone.
MODES_OF = {
    "images": ("caption",), "json": ("caption",), "num_captions": ("caption",), "top_p": ("caption",), "output": ("caption", "export"),
    "host": ("serve",), "port": ("serve",), "onnx": ("export",),
    "predictions": ("test",), "spice": ("test",), "split": ("test",), "consensus": ("test",), "tensorboard": ("train",),
}  # fmt: skip
# These modes read no data set and train nothing: what else they take.
ALLOWED = {
    "caption": (
        "mode", "model_path", "config", "device", "num_workers", "resnet_weights", "quiet", "seed", "beam_size", "length_penalty",
        "save_attention_viz", "advanced_attention_viz", "attention_viz_format", "attention_viz_dpi",
    ),
    "serve": (
        "mode", "model_path", "config", "device", "resnet_weights", "quiet", "beam_size", "length_penalty",
        "data_dir", "image_dir", "captions_file",
    ),
}  # fmt: skip


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """An argparse type: a finite number within [low, high], or above `low` where `above` is set."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not {'a whole' if kind is int else 'a'} number"
            ) from None
        if not finite or value > high or (value <= low if above else value < low):
            bounds = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def check_flags(args: argparse.Namespace, typed: set[str], parser: argparse.ArgumentParser) -> None:
    """Refuse typed flags that would have no effect."""
    for name in sorted(typed):
        modes = MODES_OF.get(name, (args.mode,))
        if args.mode not in modes:
            parser.error(f"--{name} has no effect with --mode {args.mode}, only with {' or '.join(modes)}")
        if args.mode in ALLOWED and name not in ALLOWED[args.mode] and name not in MODES_OF:
            parser.error(f"--{name} has no effect with --mode {args.mode}")
    alone = args.mode in (*ALLOWED, "export") or args.predictions is not None
    if alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "--predictions" if args.predictions is not None else f"--mode {args.mode}"
        parser.error(f"{what} runs in one process: start it with python rather than torchrun")
    from_checkpoint = args.model_path is not None
    idle = [name for name in SCHEDULER_FLAGS if name in typed and not args.use_scheduler]
    if idle and not from_checkpoint:
        parser.error(f"--{idle[0]} has no effect without --use_scheduler")
    for name in ("save_attention_viz", "attention_reg", "attention_dim"):
        if name in typed and args.decoder == "lstm" and ("decoder" in typed or not from_checkpoint):
            parser.error(f"--{name} has no effect with --decoder lstm: add --decoder attention")
    for name in sorted(typed):
        if "attention_viz" in name and not args.save_attention_viz:
            parser.error(f"--{name} has no effect without --save_attention_viz")
    if {"attention_viz_samples", "attention_viz_images"} <= typed:
        parser.error("--attention_viz_samples has no effect with --attention_viz_images, which says which")
    if args.feature_cache == "off":
        for name in ("compile", "features_on_device"):
            if name in typed and getattr(args, name) == "on":
                parser.error(f"--{name} has no effect with --feature_cache off")
    if args.use_scheduler and args.scheduler_type == "one_cycle" and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves nothing of the {args.epochs} epochs to come down in")
    if args.mode == "train" and not args.epochs + args.scst_epochs:
        parser.error("--epochs 0 leaves nothing to do: add --scst_epochs N, or train at least one epoch")
    if args.scst_epochs and args.early_stopping:
        parser.error("--early_stopping has no effect with --scst_epochs: best.pt is the best epoch of all of them")
    for name in typed & {"scst_learning_rate", "scst_samples", "scst_ce_weight"}:
        if not args.scst_epochs:
            parser.error(f"--{name} has no effect without --scst_epochs")
    if args.mode != "train" and args.model_path is None and args.predictions is None:
        parser.error(f"--mode {args.mode} needs --model_path: a checkpoint, a run directory or a folder of runs")
    if args.mode != "test" and len(args.model_path or []) > 1:
        parser.error(f"--mode {args.mode} takes one --model_path; several are an ensemble, for --mode test")
    if args.mode == "caption" and not args.images:
        parser.error("--mode caption needs --images: files, folders, patterns such as 'photos/*.jpg', or - for a list")
    if {"json", "output"} <= typed:
        parser.error("--json has no effect with --output: a FILE that ends in .jsonl has JSON lines")
    for name in ("beam_size", "length_penalty", "save_attention_viz"):
        if args.top_p is not None and name in typed:
            parser.error(f"--{name} has no effect with --top_p, which draws captions at random")
    if "seed" in typed and args.mode == "caption" and args.top_p is None:
        parser.error("--seed has no effect with --mode caption without --top_p")
    if "beam_size" in typed and args.num_captions > args.beam_size:
        parser.error(f"--num_captions {args.num_captions} needs a --beam_size of at least as many")
    if args.consensus != "off" and ("beam_size" in typed and args.beam_size == 1):
        parser.error("--consensus chooses among a beam's captions: it needs a --beam_size above 1, best 20 or more")
    if args.consensus != "off" and args.predictions is not None:
        parser.error("--consensus has no effect with --predictions, which are captions already")
    if args.quiet and args.verbose:
        parser.error("--quiet and --verbose contradict each other: leave one out")
    if args.mode == "export" and args.output is None:
        parser.error("--mode export needs --output: a folder that is not there yet")
    if args.encoder.startswith("efficientnet") and "resnet_weights" in typed:
        parser.error(f"--resnet_weights has no effect with --encoder {args.encoder}")
