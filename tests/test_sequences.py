"""Sequences of commands, drawn: what runs is what was asked, what is recorded is what ran, and no held-out image trains.

Three small data sets share images, also under other names, and split lists come and go. After each command the files
are compared with what the hooks of `Commands` saw. `python benchmarks/stress.py --only sequences` tries more of them.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule, run_state_machine_as_test
from PIL import Image
from run_files import skip_pictures
from test_resume import at_step

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.flags import NOT_CONFIGURABLE
from captioning.data.layouts import SPLITS
from captioning.runs.checkpoints import load_checkpoint
from captioning.runs.directories import read_run
from training_utils import BatchSampler

# The content of each image, by data set and name. `b` shares some with both others; `a` and `c` share one name alone.
SETS: dict[str, dict[str, int]] = {
    "a": {f"p{n}.png": n for n in range(14)} | {"p14.png": 0, "p15.png": 5},
    "b": {f"p{n}.png": n for n in range(0, 14, 2)} | {"q.png": 3, "p1.png": 20} | {f"r{n}.png": 21 + n % 4 for n in range(5)},
    "c": {f"s{n}.png": 30 + n for n in range(9)} | {"r1.png": 22, "t.png": 23, "p3.png": 40},
}  # fmt: skip
MODEL = {
    "dataset_type": "custom", "encoder": "efficientnet_lite0", "embed_size": 8, "hidden_size": 8, "num_layers": 1,
    "freq_threshold": 1, "max_length": 8, "batch_size": 8,
}  # fmt: skip
TASK = ("mode", "model_path", "init_from", "resume", "output")  # flags that say what to do
IN_FILE = st.sampled_from(["nothing", "task", "all"])  # which flags a hand-written --config gives
SIGNALS = st.none() | st.integers(1, 5)  # the step after which SIGTERM comes
TOLD = st.fixed_dictionaries(
    {"epochs": st.integers(1, 2), "learning_rate": st.sampled_from([0.005, 0.03])},
    optional={"best_metric": st.sampled_from(["val_loss", "cider"]), "seed": st.integers(0, 3)},
)
# Which lists lie beside the captions from now on, and the seed of their order; None for those of before.
KINDS = ["", "train val test", "train test", "train val", "val test", "test"]
LISTS = st.none() | st.tuples(st.sampled_from(KINDS), st.integers(0, 99))
# The data set, its lists, whether to start from last.pt rather than best.pt, and the command.
STARTS = st.tuples(st.sampled_from("abc"), LISTS, st.booleans(), IN_FILE, SIGNALS, TOLD)


def draw_sets(place: Path) -> None:
    """Draw the data sets. The captions of `c` are harder than those of `a`."""
    for data, images in SETS.items():
        (place / data / "Images").mkdir(parents=True)
        rows = ["image,caption"]
        for name, n in images.items():
            drawn = random.Random(n)
            words = " ".join(drawn.choices(["red", "dog", "blue", "cat"], k=5))
            picture = Image.frombytes("RGB", (16 + n, 16), drawn.randbytes(3 * 16 * (16 + n)))
            picture.save(place / data / "Images" / name)
            rows += [f"{name},a {'dog' if data == 'a' else words} sits"] * 2
        (place / data / "captions.txt").write_text("\n".join(rows) + "\n")


def contents(data, names) -> set[int]:
    return {SETS[data][name] for name in names}


@dataclass(eq=False)
class Run:
    """A run directory, and what the hooks saw of its training."""

    directory: Path
    data: str  # the name of its data set
    flags: dict[str, Any]  # that run_config.json has to have
    trained: set[int]  # contents of the training images of it and of its ancestors
    first: int = 0  # epochs before its own
    since: int = 0  # the last epoch before those whose scores are compared with its own
    images: set[str] = field(default_factory=set)  # names of those of its own steps
    epochs: int = 0  # finished ones of its own

    def json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def split(self) -> dict[str, dict[str, int]]:
        """The content of each image of a part by its name."""
        return {part: {name: SETS[self.data][name] for name in self.json("split.json")[part]} for part in SPLITS}

    def model(self, last: bool) -> Path:
        best = self.directory / "best.pt"
        return self.directory / "last.pt" if last or not best.exists() else best


class Commands(RuleBasedStateMachine):
    place: Path  # with the data sets and their feature cache
    runs: Bundle[Run] = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.saved = Path(tempfile.mkdtemp(dir=self.place))
        self.patch = pytest.MonkeyPatch()
        skip_pictures(self.patch)
        self.patch.setattr("captioning.modes.test.add_meteor", lambda *_: [])
        self.patch.setattr("captioning.modes.test.save_gallery", lambda *_: None)
        pixels = lambda batch: torch.from_numpy(batch).flatten(1)[:, None, :1280].expand(-1, 49, -1) / 255  # noqa: E731
        self.patch.setattr("captioning.encoders.base.Encoder.fast_form", lambda *_, **__: pixels)  # takes no seconds
        rank_batch, evaluate = BatchSampler.rank_batch, trainer.evaluate

        def watch_step(sampler, captions, *args):
            self.steps.append({sampler.collator.names[i] for i in sampler.collator.owner(captions)})
            return rank_batch(sampler, captions, *args)

        def watch_epoch(state, run):
            data = run.context.data
            if not state.is_start(run.settings):
                self.validated.append((data.image_dir.parent, {data.names[i] for i in data.splits["val"]}))
            return evaluate(state, run)

        self.patch.setattr(BatchSampler, "rank_batch", watch_step)
        self.patch.setattr(trainer, "evaluate", watch_epoch)

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.saved)
        for data in SETS:
            self.write_lists(data, ("", 0))

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.saved.rglob("*/*") if path.is_file()}

    def command(self, file: str, stop: int | None = None, **flags: Any) -> tuple[int, set[Path]]:
        """Run the program; return its exit code and the files that it wrote. A refusal writes and trains nothing."""
        given = {name: value for name, value in flags.items() if file == "all" or (file == "task" and name in TASK)}
        argv = [w for n in flags if n not in given for w in (f"--{n}", str(flags[n]))]
        if given:
            given |= {"model_path": [given["model_path"]]} if "model_path" in given else {}
            (self.saved / "flags.yaml").write_text(json.dumps(given))
            argv += ["--config", str(self.saved / "flags.yaml")]
        before, self.steps, self.validated, stopped = self.files(), [], [], []
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, stop or 0, lambda: stopped.append(os.kill(os.getpid(), signal.SIGTERM)))
            code = 2  # of argparse, which exits
            with contextlib.suppress(SystemExit):
                code = trainer.main(argv)
        changed = {path for path, time in self.files().items() if before.get(path) != time}
        assert code in ((143,) if stopped else (0, 2))
        assert code != 2 or not (changed or self.steps)
        return code, changed

    def write_lists(self, data: str, lists: tuple[str, int] | None) -> dict[str, list[str]]:
        """Write and remove split lists; return those that are there."""
        paths = {part: self.place / data / f"{part}.txt" for part in SPLITS}
        if lists is not None:
            names = random.Random(lists[1]).sample(sorted(SETS[data]), len(SETS[data]))
            parts = {"val": names[:3], "test": names[3:6], "train": names[7:]}  # one image is in none
            for part, path in paths.items():
                path.write_text("\n".join(parts[part])) if part in lists[0] else path.unlink(missing_ok=True)
        return {part: path.read_text().split() for part, path in paths.items() if path.exists()}

    def begin(self, way, parent, start):
        """Start a run, and compare its split with the lists; nothing is returned where it is refused."""
        data, lists, last, file, stop, told = start
        source, known = None, set()
        goes_on, is_own = way == "model_path", way == "model_path" and parent.data == data
        places = {"data_dir": data, "feature_cache": "cache", "model_save_dir": self.saved.name}
        flags = asked = told | {name: str(self.place / folder) for name, folder in places.items()}
        if way == "new":
            flags = asked = MODEL | flags
        elif way == "config":  # a file that a run wrote has its settings, but not what the run was told to do
            config, data, file = parent.json("run_config.json"), parent.data, "nothing"
            if config["init_from"] is not None:
                return multiple()
            flags = {name: value for name, value in config.items() if name not in NOT_CONFIGURABLE}
            asked = {"config": str(parent.directory / "run_config.json")}
        else:
            source, known = parent.model(last), parent.trained
            old = load_checkpoint(source)
            asked = {way: str(source)} | flags
            flags = {name: old["flags"][name] for name in (*MODEL, "best_metric", "seed") if goes_on} | flags
        listed = self.write_lists(data, lists)
        code, changed = self.command(file, stop, **asked)
        if code == 2:
            assert known & contents(data, SETS[data]) and not is_own, "refused without need"
            return multiple()
        (directory,) = {path.parent for path in changed if path.name == "run_config.json"}
        flags |= {"model_path": None, "init_from": None} | ({way: str(source)} if source else {})
        run = Run(directory, data, flags, known.copy(), since=-1 if way == "init_from" else 0)
        split = run.split()
        named = set().union(*split.values())
        assert len(named) == sum(map(len, split.values())) and split["train"] and split["val"]
        assert not {*split["train"].values()} - known & contents(data, listed.get("val", []) + listed.get("test", []))
        run.trained |= {*split["train"].values()}
        if goes_on:
            run.first = run.since = old["epoch"]
            before, metrics = parent.split(), (old["best"]["metric"], run.json("run_config.json")["best_metric"])
            if len({*metrics}) == 1 and all(split[part] == before[part] for part in ("val", "test")):
                run.since = parent.since
            assert not is_own or split == before
        if not is_own:
            copies = {content for content, count in Counter(SETS[data].values()).items() if count > 1}
            unlisted = SETS[data].keys() - set().union(*listed.values()) if "train" in listed else set()
            out = SETS[data].keys() - named - unlisted
            assert contents(data, out) <= copies, f"left out: {out}"
        if not source:
            assert all({*split[part]} == {*listed[part]} for part in listed if part != "train")
        self.check(run, code, changed)
        return run

    new = initialize(target=runs, way=st.just("new"), parent=st.none(), start=STARTS)(begin)
    go_on = rule(target=runs, way=st.just("model_path"), parent=runs, start=STARTS)(begin)
    anew = rule(target=runs, way=st.sampled_from(["init_from", "config"]), parent=runs, start=STARTS)(begin)

    def check(self, run: Run, code: int, changed: set[Path]) -> None:
        """Compare a run's files with what the hooks saw, after it was begun or resumed."""
        run.images = run.images.union(*self.steps)
        run.epochs += len(self.validated)
        split, config, last = run.split(), run.json("run_config.json"), load_checkpoint(run.directory / "last.pt")
        assert not run.trained & {*split["val"].values(), *split["test"].values()}, "held-out images were trained on"
        assert run.images <= split["train"].keys() and all(path.is_relative_to(run.directory) for path in changed)
        assert all(seen == (self.place / run.data, {*split["val"]}) for seen in self.validated)
        assert all(last["split"][part]["names"] == [*split[part]] for part in SPLITS)
        assert {name: config[name] for name in run.flags} == run.flags
        assert all(last["flags"][name] == value for name, value in config.items() if name in last["flags"])
        assert last["epoch"] == run.first + run.epochs
        if code == 143:
            return
        rows, curve = run.json("metrics_history.json"), run.json("loss_curve.json")
        assert run.epochs == config["epochs"] and run.images == split["train"].keys()
        start = curve["epochs"][0]  # 0 with --init_from, and where that run was trained further
        assert all(
            values == [*range(start, last["epoch"] + 1)] for values in (curve["epochs"], [r["epoch"] for r in rows])
        )
        assert start == 0 or config["init_from"] is None
        assert curve["learning_rates"][run.first + 1 - start :] == [config["learning_rate"]] * run.epochs
        scores = [row["cider"] for row in rows]
        if config["best_metric"] == "val_loss":
            scores = [-loss for loss in curve["validation_losses"]]
        since = run.since + 1 - start
        better = [n + start for n in range(since, len(rows)) if scores[n] > max(scores[since:n], default=-1e9)]
        named = read_run(run.directory).best["epoch"], load_checkpoint(run.directory / "best.pt")["epoch"]
        assert {*named, last["best"]["epoch"]} == {better[-1]}, f"not the best epoch: {named}"

    @rule(target=runs, run=runs, other=st.sampled_from("abc"), file=IN_FILE, stop=SIGNALS)
    def resume(self, run, other, file, stop):
        if other != run.data:
            code, _ = self.command(file, resume=str(run.directory), data_dir=str(self.place / other))
            assert code == 2, "resumed on other data"
        code, changed = self.command(file, stop, resume=str(run.directory))
        assert code != 2, "trained, but not resumed"
        self.check(run, code, changed)
        return multiple()

    @rule(
        target=runs,
        run=runs,
        part=st.sampled_from(SPLITS),
        how=st.tuples(st.booleans(), st.sampled_from("abc"), IN_FILE),
    )
    def use(self, run, part, how):
        """Test a model on its own data and on others; there is no `--split train`."""
        last, other, file = how
        model, split = run.model(last), run.split()
        flags = {"mode": "test", "model_path": str(model), "split": part, "beam_size": 1, "consensus": "off"}
        for data in dict.fromkeys([run.data, other]):
            code, changed = self.command(file, **flags, data_dir=str(self.place / data))
            if data == run.data:
                assert (code == 0) == (part != "train" and len(split[part]) > 0), "trained, but not tested"
            if code == 0:
                row = run.json("test_metrics.json")[-1]
                names = {entry["image_id"] for entry in run.json(row["captions_file"])}
                assert not contents(data, names) & run.trained and (data != run.data or names == split[part].keys())
                assert (row["checkpoint"], row["images"]) == (model.name, len(names))
                assert {path.parent for path in changed} == {run.directory}
        return multiple()


def try_sequences(place: Path, examples: int, steps: int, first: str | None = None) -> None:
    """Draw sequences of commands. Args: first: seed of others than the tests try."""
    machine: Any = type("Sequences", (Commands,), {"place": place})
    how = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=first is None, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    run_state_machine_as_test(machine if first is None else seed(first)(machine), settings=how)


def test_what_runs_is_what_was_asked(tmp_path):
    draw_sets(tmp_path)
    try_sequences(tmp_path, 10, 10)
