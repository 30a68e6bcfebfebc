"""Settings: the value of every flag, parsed once from the command line, `--config`, or an interrupted run.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import logging
import os
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from captioning.config.flags import (
    ADAPTATION,
    CONFIG_NAMES,
    DATA_MODES,
    DEFAULTS,
    FACTS,
    FLAGS,
    GROUPS,
    LIGHT_MODES,
    NOT_INHERITED,
    TASK,
    Flag,
    as_path,
    as_text,
    chosen_beam,
)
from captioning.config.registry import DECODERS, ENCODERS, LIBRARIES, folder_name, idle_flags, library_of, size_problem
from captioning.io import UserError, first_line, in_checkout, log, not_installed, read_json, unreadable


class Settings(argparse.Namespace):
    """The value of every flag, resolved once. Nobody writes to it afterwards; `with_values` makes another.

    Attributes:
        explicit: names of the flags that the command line or a hand-written `--config` gives.
    """

    explicit: frozenset[str]

    def __init__(self, values: Mapping[str, Any], explicit: Iterable[str] = ()):
        self.__dict__.update(values, explicit=frozenset(explicit))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"settings are not written to: captioning/config/settings.py resolves --{name}")

    @property
    def adapts(self) -> bool:
        """Whether a new run starts on other data from a model's weights; a resumed one just goes on."""
        return self.mode == "train" and self.init_from is not None and self.resume is None

    def values(self) -> dict[str, Any]:
        """Every flag by name."""
        return {name: getattr(self, name) for name in FLAGS}

    @property
    def by_consensus(self) -> bool:
        """Whether captions are chosen by consensus, where the checkpoint has what that needs."""
        return self.consensus == "on" and self.mode != "tune"

    def set_log_level(self) -> None:
        log.setLevel(logging.WARNING if self.quiet else logging.DEBUG if self.verbose else logging.INFO)

    def with_values(self, **changes: Any) -> Settings:
        return Settings(self.values() | changes, self.explicit)

    def stored(self) -> dict[str, Any]:
        """Return every flag as a plain value, for checkpoints and run_config.json."""

        def plain(value: Any) -> Any:
            return (
                list(map(plain, value)) if isinstance(value, list) else str(value) if isinstance(value, Path) else value
            )

        return {name: plain(value) for name, value in self.values().items()}

    def with_checkpoint(self, checkpoint: Mapping[str, Any], source: Path) -> Settings:
        """Take from a checkpoint what it decides; only an explicit flag can contradict it.

        Args:
            checkpoint: as `checkpoints.load_checkpoint` returns it.
            source: its file, for messages.

        Raises:
            UserError: an explicit flag contradicts it, or has no effect with it.
        """
        saved = checkpoint["flags"]
        # What its decoder or encoder does not read contradicts nothing: `require_effect` says that it has no effect.
        idle = set().union(*(idle_flags(entries, saved[kind]) for kind, entries in KINDS.items()))
        found: dict[str, Any] = {}
        for flag in FLAGS.values():
            name = flag.name
            if self.adapts and name in NOT_INHERITED:
                continue
            given = flag.checkpoint == "fixed" and name in self.explicit - idle
            if given and getattr(self, name) != saved[name]:
                raise UserError(
                    f"--{name} {getattr(self, name)} contradicts {source}, which was trained with {saved[name]}: "
                    f"leave the flag out, or train a new model without --{'init_from' if self.adapts else 'model_path'}"
                )
            kept = flag.checkpoint == "kept" or (flag.checkpoint == "train" and self.mode == "train")
            if name in PLACES and self.explicit & PLACES:  # one place of a data set says where all of it is
                continue
            if flag.checkpoint == "fixed" or (kept and name not in self.explicit):
                found[name] = Path(saved[name]) if flag.parse is as_path and saved[name] else saved[name]
        if not has_cache(found.get("feature_cache", "off"), saved["encoder"]):
            del found["feature_cache"]
        consensus = self.by_consensus and checkpoint["consensus"] is not None
        found |= chosen_beam(self.explicit, checkpoint["decoding"], consensus)
        settings = self.with_values(**found)
        if len(self.model_path or []) < 2:  # of an ensemble one model may read what another does not
            settings.require_effect([settings], f"with {source}")
        if "fine_tune_learning_rate" in self.explicit and not settings.fine_tune:
            raise UserError(f"--fine_tune_learning_rate has no effect with {source}, whose encoder is all frozen")
        if "replay_data_dir" in self.explicit and not settings.replay:
            raise UserError(f"--replay_data_dir has no effect with {source}, which was trained without --replay")
        return settings

    def require_effect(self, models: Sequence[Settings], where: str) -> None:
        """Raise UserError if an explicit flag is read by the encoder or decoder of none of these models' settings."""
        for kind, entries in KINDS.items():
            names = {getattr(model, kind) for model in models}
            for flag in sorted(self.explicit.intersection(*(idle_flags(entries, name) for name in names))):
                raise UserError(f"--{flag} has no effect {where}, whose {kind} is {' or '.join(sorted(names))}")


def has_cache(feature_cache: str, encoder: str) -> bool:
    """Return whether a checkpoint's cache is used: whoever wrote the checkpoint makes no folder elsewhere."""
    if feature_cache == "off":
        return True
    try:
        return any(Path(feature_cache).glob(f"{folder_name(encoder)}-*"))
    except OSError:  # of a folder of another user's
        return False


def cache_folder(text: str) -> Path | None:
    """Return the folder that `--feature_cache` names; None for `off`."""
    return None if text == "off" else Path(text)


LARGEST_CONFIG = 100_000  # bytes of a YAML file of flags
PLACES = {"data_dir", "image_dir", "captions_file"}
PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE.with_name("configs") if in_checkout() else PACKAGE / "recipes"
KINDS = {"decoder": DECODERS, "encoder": ChainMap(ENCODERS, LIBRARIES)}


# --------------------------------------------------------------------------------------------------
# Parsing


def get_parser() -> argparse.ArgumentParser:
    """Return a parser of all flags that leaves out what is not given."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help explains them all",  # a mistyped flag's message is not buried
        description="Train and test an image captioner on Flickr8k, Flickr30k or your own photos.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            default = "" if flag.default is None or flag.switch else f" (default: {default_text(flag.default)})"
            only = f"--mode {' or '.join(flag.modes)}: " if len(flag.modes) < 2 and "train" not in flag.modes else ""
            about: dict[str, Any] = {"help": (only + flag.help + default).replace("%", "%%")}
            if flag.switch:
                about["action"] = "store_true"
            else:
                about |= {
                    "type": flag.parse,
                    "choices": flag.choices or None,
                    "metavar": flag.metavar,
                }
                about |= {"nargs": "+"} if flag.many else {}
            group.add_argument(f"--{flag.name}", **about)
    return parser


def default_text(value: Any) -> str:
    """A default as `--help` prints it: 0.0001 rather than 1e-04."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_flags(argv: list[str]) -> Settings:
    """Parse a command line once, with the `--config` or run that it names.

    Raises:
        SystemExit: a mistake in the flags (exit code 2, the message printed), `--help`, or `--encoder list`.
        UserError: a file of flags cannot be read.
    """
    if (pattern := list_pattern(argv)) is not None:
        from captioning.encoders.listing import print_encoders

        print_encoders(pattern)
        raise SystemExit(0)
    parser = get_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(parser, unknown[0])
    typed = vars(namespace)
    config, given = config_flags(parser, find_config(typed["config"])) if "config" in typed else ({}, set())
    # A file may say what to do, as the command line does.
    typed = {name: config.pop(name) for name in TASK if name in config} | typed
    defaults = dict(DEFAULTS)
    explicit = set(typed)
    if "resume" in typed:
        typed = config | {name: value for name, value in typed.items() if name != "config"}
        explicit |= given
        fixed = next((name for name in typed if not FLAGS[name].resume), None)
        if fixed:
            parser.error(
                f"--{fixed} has no effect with --resume: an interrupted run keeps its original settings. "
                f"To train longer or otherwise: --model_path {typed['resume']} --epochs N"
            )
        file = typed["resume"] / "run_config.json"
        if not file.is_file():
            raise UserError(resume_advice(typed["resume"]))
        config, _ = config_flags(parser, file, of_config=False)
        if PLACES & set(typed):
            config = {name: value for name, value in config.items() if name not in PLACES}
    elif "config" in typed:
        # What the command line switches off takes along what the file says of it.
        explicit |= {name for name in given if not (FLAGS[name].needs in typed and not typed[FLAGS[name].needs])}
        # A recipe of training serves other modes for what they read of it.
        mode = typed.get("mode", "train")
        explicit -= {
            name for name in given - set(typed) if mode not in FLAGS[name].modes and "train" in FLAGS[name].modes
        }
    for kind, entries in KINDS.items():
        defaults |= entries[library_of((defaults | config | typed)[kind])].defaults
    if (config | typed).get("init_from") is not None:
        defaults |= ADAPTATION
        if (config | typed).get("scst_epochs"):
            defaults["early_stopping"] = 0
    values = defaults | config | typed
    if "epochs" in typed and "warmup_epochs" not in typed and warmup_too_long(values):  # that of a recipe
        was, values["warmup_epochs"] = values["warmup_epochs"], values["epochs"] - 1
        print(f"Note: --warmup_epochs {values['warmup_epochs']} instead of {was}, by --epochs", file=sys.stderr)
    if values["quiet"] and values["verbose"] and len({"quiet", "verbose"} & set(typed)) == 1:  # it wins over a file
        values |= {"quiet": "quiet" in typed, "verbose": "verbose" in typed}
    settings = Settings(values, explicit)

    def error(message: str) -> NoReturn:
        named = [name for name in explicit - set(typed) if f"--{name} " in message]
        parser.error(message + (f" ({named[0]} is from {typed['config']})" if named else ""))

    check_flags(settings, error)
    return settings


def list_pattern(argv: list[str]) -> str | None:
    """Return the pattern of `--encoder list [PATTERN]`, None where that is not asked."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--encoder=") else [word])]
    for place, word in enumerate(words):
        if word == "--encoder" and words[place + 1 : place + 2] == ["list"]:
            return next((other for other in words[place + 2 : place + 3] if not other.startswith("--")), "")
    return None


def answer_flags(argv: list[str]) -> Settings:
    """Parse the command line of a process that may be about to import PyTorch; answer `--help` and mistakes, and exit.

    Of several processes of one machine the first prints the answer.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as streams:
        if not first:
            streams.enter_context(contextlib.redirect_stdout(nowhere))
            streams.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            settings = parse_flags(argv)
            if settings.mode not in LIGHT_MODES and not importlib.util.find_spec("torch"):
                raise not_installed("torch")
        except ModuleNotFoundError as missing:
            print(f"error: {not_installed(missing.name)}", file=sys.stderr)
            sys.exit(2)
        except (UserError, OSError) as problem:
            print(f"error: {unreadable(problem) if isinstance(problem, OSError) else problem}", file=sys.stderr)
            sys.exit(2)
    return settings


def resume_advice(path: Path) -> str:
    """Say what to give `--resume` instead of a path that is not a run directory."""
    from captioning.runs.directories import newest_interrupted, reproducing_command

    newest = newest_interrupted(path) if path.is_dir() else None
    if newest is None:
        return f"--resume {path} is not a run directory: give the one that the interrupted run named"
    command = reproducing_command(["--resume", str(newest)])
    return f"--resume {path} is not a run directory. The newest interrupted run below it: {command}"


def refuse_unknown(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    parser.error(f"unrecognized argument {word}{suggestion(name, FLAGS, '--')}")


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f": did you mean {prefix}{close[0]}?" if close else ""


def config_flags(
    parser: argparse.ArgumentParser, file: Path, of_config: bool = True
) -> tuple[dict[str, Any], set[str]]:
    """Read the flags in a YAML or JSON file, e.g. a `run_config.json`, as if they stood on the command line.

    In a file that this program wrote, the flags that it lists under `explicit` count as explicit; in any other file all
    do. Facts of a run, what to do in a file that a run wrote, and flags without a value are passed over.

    Args:
        of_config: whether the user named the file, rather than the run to resume.

    Returns:
        the flags by name, and the names of those that count as explicit.

    Raises:
        UserError: the file cannot be read.
        SystemExit: through `parser.error`: an unknown flag, or a value that it does not take.
    """
    ours = {theirs: name for name, theirs in CONFIG_NAMES.items()}
    content = read_config(file)
    recorded, written_by_run = content.get("explicit"), "timestamp" in content
    passed = [name for name in TASK if written_by_run and content.get(name) not in (None, DEFAULTS[name])]
    if passed and of_config:
        print(f"Note: {file} was written by a run; not taken from it: {', '.join(passed)}", file=sys.stderr)
    flags: dict[str, Any] = {}
    for key, value in content.items():
        name = ours.get(key, key)
        if name in FACTS or value is None or (written_by_run and name in TASK):
            continue
        if name == "config":
            parser.error(f"{file}: a file of flags cannot name another: give that one with --config")
        if name not in FLAGS:
            parser.error(f"{file}: unknown flag {name!r}{suggestion(str(name), FLAGS)}")
        flags[name] = config_value(parser, file, FLAGS[name], value)
    if isinstance(recorded, list):
        explicit = {name for name in recorded if isinstance(name, str) and name in flags}
    else:
        explicit = set(flags)
    return flags, {name for name in explicit if not (FLAGS[name].switch and not flags[name])}


def config_value(parser: argparse.ArgumentParser, file: Path, flag: Flag, value: Any) -> Any:
    """One value of a file of flags, checked as the command line's values are."""
    where = f"{file}: {flag.name}: "
    if flag.switch:
        if type(value) is not bool:
            parser.error(where + "expected true or false")
        return value
    assert flag.parse is not None
    if type(value) is bool and (flag.name == "feature_cache" or "off" in flag.choices):  # as YAML reads on and off
        value = "on" if value else "off"
    entries = value if flag.many and type(value) is list else [value]
    parsed: list[Any] = []
    for entry in entries:
        try:
            if (flag.many and type(value) is not list) or type(entry) not in (str, int, float):
                raise ValueError("expected a list of names" if flag.many else "expected a number or a text of one line")
            parsed.append(flag.parse(as_text(str(entry))))
        except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
            parser.error(where + str(error))
        if flag.choices and parsed[-1] not in flag.choices:
            parser.error(where + f"{entry!r} is not one of {', '.join(flag.choices)}")
    return parsed if flag.many else parsed[0]


def find_config(path: Path) -> Path:
    """Return the file that `--config` names: by its path, which wins, or as a recipe, by its name."""
    recipe = RECIPES / f"{path.name}.yaml"
    return recipe if str(path) == path.name and not path.exists() and recipe.is_file() else path


def read_config(file: Path) -> dict[Any, Any]:
    """Read a YAML or JSON mapping.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if file.suffix == ".json":
        values = read_json(file)
    else:
        import yaml

        class PlainLoader(yaml.SafeLoader):
            """No aliases and no merge keys: a few hundred bytes of them take minutes."""

            def compose_node(self, parent: Any, index: Any) -> Any:
                if self.check_event(yaml.AliasEvent):
                    raise ValueError("aliases are not allowed")
                return super().compose_node(parent, index)

            def flatten_mapping(self, node: Any) -> None:
                if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                    raise ValueError("merge keys are not allowed")
                names = [key.value for key, _ in node.value]
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise ValueError(f"{twice} is given twice")

            def construct_yaml_int(self, node: Any) -> int:
                if re.fullmatch(r"[-+]?0[0-9_]+", node.value):
                    raise ValueError(f"{node.value} begins with a 0, which YAML reads as an octal number")
                return int(super().construct_yaml_int(node))

        PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)

        try:
            if file.stat().st_size > LARGEST_CONFIG:
                raise ValueError(f"larger than {LARGEST_CONFIG} bytes")
            values = yaml.load(file.read_text(encoding="utf-8-sig"), PlainLoader)
        except OSError as error:
            raise UserError(
                f"cannot read --config {file}: {error.strerror}. Give a file of flags, or the name of a recipe: "
                + ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
            ) from error
        except Exception as error:  # yaml's constructors raise what they meet: `!!bool x` is a KeyError
            raise UserError(f"cannot read --config {file} as YAML: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} is not a mapping of flags: expected lines such as `epochs: 15`")
    return values


# --------------------------------------------------------------------------------------------------
# Cross-flag validation


def check_flags(settings: Settings, error: Callable[[str], Any]) -> None:
    """Refuse explicit flags that would have no effect, and flags that contradict each other.

    Args:
        error: is called with the first mistake, e.g. `parser.error`.
    """
    args, explicit, mode = settings, settings.explicit, settings.mode
    from_checkpoint = args.mode in ("caption", "serve") or args.model_path is not None or args.init_from is not None
    for name in sorted(explicit):
        flag = FLAGS[name]
        if mode not in flag.modes:
            error(f"--{name} has no effect with --mode {mode}, only with {' or '.join(flag.modes)}")
        left_open = from_checkpoint and flag.needs == "fine_tune"  # the checkpoint says
        left_open |= args.model_path is not None and flag.needs in ("use_scheduler", "replay")
        left_open |= args.model_path is not None and name == "replay" and args.replay == 0  # a run may go on without
        if flag.needs and not getattr(args, flag.needs) and not left_open:
            error(f"--{name} has no effect without --{flag.needs}")
    for kind, entries in KINDS.items():
        if from_checkpoint and kind not in explicit:
            continue  # the checkpoint says which it is: see Settings.with_checkpoint
        for name in sorted(explicit & idle_flags(entries, getattr(args, kind))):
            others = " or ".join(other for other, entry in entries.items() if name in entry.flags)
            error(f"--{name} has no effect with --{kind} {getattr(args, kind)}: add --{kind} {others}")
    if {"attention_viz_samples", "attention_viz_images"} <= explicit:
        error("--attention_viz_samples has no effect with --attention_viz_images, which says which")
    if args.feature_cache == "off" and "features_on_device" in explicit and args.features_on_device == "on":
        error("--features_on_device has no effect with --feature_cache off")
    check_modes(args, error)
    if not from_checkpoint and (problem := size_problem(args.values())):
        error(problem)
    if mode == "train":
        check_training(args, error)
    else:
        check_decoding(args, error)


def check_modes(args: Settings, error: Callable[[str], Any]) -> None:
    """What each mode needs."""
    mode = args.mode
    if mode not in DATA_MODES or args.predictions is not None:
        what = "--predictions" if args.predictions is not None else f"--mode {mode}"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            error(f"{what} runs in one process: start it with python rather than torchrun")
    if mode in ("test", "tune", "export") and args.model_path is None and args.predictions is None:
        error(f"--mode {mode} needs --model_path: a checkpoint, a run directory or a folder of runs")
    if mode != "test" and len(args.model_path or []) > 1:
        error(f"--mode {mode} takes one --model_path; several are an ensemble, for --mode test")
    if mode == "caption" and not args.images:
        error("--mode caption needs --images: files, folders, patterns such as 'photos/*.jpg', or - for a list")
    if mode == "export" and args.output is None:
        error("--mode export needs --output: a folder that is not there yet")
    if args.quiet and args.verbose:
        error("--quiet and --verbose contradict each other: leave one out")


def check_training(args: Settings, error: Callable[[str], Any]) -> None:
    """Cross-flag validation of training."""
    if args.init_from is not None and args.model_path is not None:
        error("--init_from starts a new run on other data, --model_path trains a run further: leave one of them out")
    if warmup_too_long(args.values()):
        error(f"--warmup_epochs {args.warmup_epochs} leaves nothing of the {args.epochs} epochs to come down in")
    if not args.epochs + args.scst_epochs:
        error("--epochs 0 leaves nothing to do: add --scst_epochs N, or train at least one epoch")
    if args.scst_epochs and args.early_stopping:
        error("--early_stopping has no effect with --scst_epochs: best.pt is the best epoch of all of them")


def warmup_too_long(values: Mapping[str, Any]) -> bool:
    one_cycle = values["use_scheduler"] and values["scheduler_type"] == "one_cycle"
    return bool(one_cycle and values["warmup_epochs"] >= values["epochs"] > 0)


def check_decoding(args: Settings, error: Callable[[str], Any]) -> None:
    """Cross-flag validation of decoding and captioning."""
    explicit = args.explicit
    if {"json", "output"} <= explicit:
        error("--json has no effect with --output: a FILE that ends in .jsonl has JSON lines")
    if "prefix" in explicit and args.sidecar == "xmp":
        error("--prefix has no effect with --sidecar xmp, only with txt")
    searching = ("beam_size", "length_penalty", "no_repeat_ngram", "save_attention_viz", "min_confidence", "consensus")
    for name in searching:
        if args.top_p is not None and name in explicit:
            error(f"--{name} has no effect with --top_p, which samples captions")
    if "seed" in explicit and args.mode == "caption" and args.top_p is None:
        error("--seed has no effect with --mode caption without --top_p")
    if "beam_size" in explicit and args.num_captions > args.beam_size:
        error(f"--num_captions {args.num_captions} needs a --beam_size of at least as many")
    if args.consensus == "on" and {"consensus", "beam_size"} <= explicit and args.beam_size == 1:
        error("--consensus chooses among a beam's captions: it needs a --beam_size above 1, best 20 or more")
    for name in ("consensus", "beam_size", "length_penalty", "no_repeat_ngram"):
        if name in explicit and args.predictions is not None:
            error(f"--{name} has no effect with --predictions, which are captions already")
