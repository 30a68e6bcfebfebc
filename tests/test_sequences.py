"""Sequences of commands, drawn: what runs is what was asked, what is recorded is what ran, and no held-out image trains.

Three small data sets share images, also under other names, and split lists come and go. After each command the files
are compared with what the hooks of `Commands` saw. `python benchmarks/stress.py --only sequences` tries more sequences.
"""

import contextlib
import io
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

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule, run_state_machine_as_test
from PIL import Image
from run_files import skip_pictures
from test_resume import at_step

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.flags import FLAGS, NOT_CONFIGURABLE
from captioning.data.layouts import SPLITS
from captioning.runs.checkpoints import load_checkpoint
from captioning.runs.directories import find_checkpoint, read_run
from training_utils import BatchSampler

# The content of each image, by data set and name. `b` shares some with both others, `a` and `c` share a name alone.
SETS: dict[str, dict[str, int]] = {
    "a": {f"p{n}.png": n for n in range(14)} | {"p14.png": 0, "p15.png": 5},
    "b": {f"p{n}.png": n for n in range(0, 14, 2)} | {"q.png": 3, "p1.png": 20} | {f"r{n}.png": 21 + n % 4 for n in range(5)},
    "c": {f"s{n}.png": 30 + n for n in range(9)} | {"r1.png": 22, "t.png": 23, "p3.png": 40},
}  # fmt: skip
MODEL = {
    "dataset_type": "custom", "encoder": "efficientnet_lite0", "decoder": "lstm", "embed_size": 8, "hidden_size": 8,
    "num_layers": 1, "freq_threshold": 1, "max_length": 8, "batch_size": 8,
}  # fmt: skip
TASK = ("mode", "model_path", "init_from", "resume", "output")  # flags that say what to do
data_sets, switch = st.sampled_from("abc"), st.booleans()
in_file = st.sampled_from(["nothing", "task", "all"])  # which flags a hand-written --config gives
# Which lists lie beside the captions from now on, None for those of before, and the seed of their order.
new_lists = st.none() | st.tuples(
    st.sampled_from(["", "train val test", "train test", "train val", "val test", "test"]), st.integers(0, 99)
)
stops = st.none() | st.integers(1, 5)  # the step after which SIGTERM comes
told = st.fixed_dictionaries(
    {"epochs": st.integers(1, 2), "learning_rate": st.sampled_from([0.005, 0.03])},
    optional={"best_metric": st.sampled_from(["val_loss", "cider"]), "seed": st.integers(0, 3)},
)


def draw_sets(place: Path) -> None:
    """Draw the data sets. The words of `c` are harder than those of `a`."""
    for data, images in SETS.items():
        (place / data / "Images").mkdir(parents=True)
        rows = ["image,caption"]
        for name, n in images.items():
            pixels = np.random.default_rng(n).integers(0, 255, (16, 16 + n, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / data / "Images" / name)
            words = " ".join(random.Random(n).choices("red dog blue cat green bird".split(), k=5))
            rows += [f"{name},a {'dog' if data == 'a' else words} sits"] * 2
        (place / data / "captions.txt").write_text("\n".join(rows) + "\n")


def some_pixels(pixels: np.ndarray) -> torch.Tensor:
    """Stand in for the encoder, (B, 224, 224, 3) -> (B, 49, 1280), without its seconds."""
    return torch.from_numpy(pixels).flatten(1)[:, None, :1280].float().expand(-1, 49, -1) / 255


def contents(data: str, names) -> set[int]:
    return {SETS[data][name] for name in names}


@dataclass(eq=False)
class Run:
    """A run directory, and what the hooks saw of its training."""

    directory: Path
    data: str  # the name of its data set
    flags: dict[str, Any]  # that run_config.json has to have
    first: int  # epochs before its own
    since: int  # epochs before those whose scores are compared with its own
    trained: set[int]  # contents of the training images of it and of its ancestors
    images: set[str] = field(default_factory=set)  # names of those of its own steps
    epochs: int = 0  # finished ones of its own

    def json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    @property
    def held_out(self) -> list[dict[str, int]]:
        """The validation images and the test images: the content of each by its name."""
        return [{name: SETS[self.data][name] for name in self.json("split.json")[part]} for part in ("val", "test")]

    def model(self, last: bool) -> Path:
        """What to give as a model: the directory, whose best.pt counts, or last.pt."""
        return self.directory / "last.pt" if last or not (self.directory / "best.pt").exists() else self.directory


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
        self.patch.setattr("captioning.encoders.base.Encoder.fast_form", lambda *_, **__: some_pixels)
        rank_batch, evaluate = BatchSampler.rank_batch, trainer.evaluate

        def watch_step(sampler, captions, epoch, step):
            self.steps.append({sampler.collator.names[i] for i in sampler.collator.owner(captions)})
            return rank_batch(sampler, captions, epoch, step)

        def watch_epoch(state, run):
            data = run.context.data
            self.validated.append((data.image_dir.parent, {data.names[i] for i in data.splits["val"]}))
            return evaluate(state, run)

        self.patch.setattr(BatchSampler, "rank_batch", watch_step)
        self.patch.setattr(trainer, "evaluate", watch_epoch)

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.saved)
        for path in self.place.glob("*/*.txt"):
            path.unlink() if path.stem in SPLITS else None

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.saved.rglob("*") if path.is_file()}

    def command(self, file: str, stop: int | None = None, **flags: Any) -> tuple[int, set[Path]]:
        """Run the program; return its exit code, and which files it wrote. A refusal says why and writes none."""
        given = {name: value for name, value in flags.items() if file == "all" or (file == "task" and name in TASK)}
        argv = [w for n in flags if n not in given for w in (f"--{n}", *map(str, np.atleast_1d(flags[n]).tolist()))]
        if given:
            path = self.saved / "flags.yaml"
            path.write_text(json.dumps(given, default=str))
            argv += ["--config", str(path)]
        before, output = self.files(), io.StringIO()
        self.steps, self.validated, self.stopped = [], [], False

        def send() -> None:
            self.stopped = True
            os.kill(os.getpid(), signal.SIGTERM)

        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            at_step(patch, stop or 0, send)
            try:
                code = trainer.main(argv)
            except SystemExit as end:
                code = end.code
        self.told = f"{' '.join(argv)} {given}\n{output.getvalue()[-3000:]}"
        changed = {path for path, time in self.files().items() if before.get(path) != time}
        assert code in (0, 2, 143) and (code == 143) == self.stopped, self.told
        if code == 2:
            assert not changed and not self.steps and "error: " in output.getvalue().splitlines()[-1], self.told
        return code, changed

    def write_lists(self, data: str, lists: tuple[str, int] | None) -> dict[str, list[str]]:
        """Write and remove split lists; return those that are there."""
        if lists:
            names = random.Random(lists[1]).sample(sorted(SETS[data]), len(SETS[data]))
            parts = {"val": names[:3], "test": names[3:6], "train": names[7:]}  # one image is in none
            for part in SPLITS:
                (self.place / data / f"{part}.txt").unlink(missing_ok=True)
            for part in lists[0].split():
                (self.place / data / f"{part}.txt").write_text("\n".join(parts[part]))
        return {path.stem: path.read_text().split() for path in (self.place / data).glob("*.txt") if path.stem in SPLITS}

    # ----------------------------------------------------------------------------------------------
    # Training

    def begin(self, data: str, lists: Any, file: str, stop: int | None, parent: Run | None, way: dict[str, Any],
              expected: dict[str, Any]) -> Any:  # fmt: skip
        """Start a run, check its split, and return it; nothing where it is refused.

        Args:
            parent: the run that it goes on from or adapts.
            way: the flags of the command.
            expected: what run_config.json has to have.
        """
        listed = self.write_lists(data, lists)
        source = find_checkpoint(Path(np.atleast_1d(way.get("model_path", way.get("init_from")))[0])) if parent else None
        old = load_checkpoint(source) if source else None
        code, changed = self.command(file, stop, **way)
        known = parent.trained if parent else set()
        if code == 2:
            is_own = "model_path" in way and parent.data == data if parent else True
            assert not is_own and contents(data, SETS[data]) & known, f"refused without need: {self.told}"
            return multiple()
        (directory,) = {path.parent for path in changed if path.name == "run_config.json"}
        goes_on = "model_path" in way
        run = Run(directory, data, expected | {"model_path": None, "init_from": None}, 0, 0, set(known))
        run.flags |= {"model_path" if goes_on else "init_from": str(source) if source else None}
        split = run.json("split.json")
        names = [name for part in SPLITS for name in split[part]]
        run.trained |= contents(data, split["train"])
        out = set(SETS[data]).difference(names)
        assert len(names) == len({*names}) and split["train"] and split["val"], self.told
        run.first = run.since = old["epoch"] if goes_on else 0
        if goes_on and run.held_out == parent.held_out:  # the scores of both can be compared
            same_metric = run.json("run_config.json")["best_metric"] == old["best"]["metric"]
            run.since = parent.since if same_metric else run.first
        if goes_on and parent.data == data:
            assert all(split[part] == parent.json("split.json")[part] for part in SPLITS), self.told
        else:
            copied = {content for content, count in Counter(SETS[data].values()).items() if count > 1}
            unlisted = set(SETS[data]).difference(*listed.values()) if "train" in listed else set()
            assert not {n for n in out - unlisted if SETS[data][n] not in copied}, f"left out: {out}: {self.told}"
            held = contents(data, [name for part in ("val", "test") for name in listed.get(part, ())])
            assert not held & contents(data, split["train"]) - known, f"{held} are listed: {self.told}"
            if parent is None:
                assert all({*split[part]} == {*listed[part]} for part in {"val", "test"} & {*listed}), self.told
        self.check(run, code, changed)
        return run

    def check(self, run: Run, code: int, changed: set[Path]) -> None:
        """Compare a run's files with what the hooks saw, after it was begun or resumed."""
        run.images = run.images.union(*self.steps)
        run.epochs += len(self.validated)
        split, config, last = run.json("split.json"), run.json("run_config.json"), load_checkpoint(run.directory / "last.pt")
        held = contents(run.data, split["val"] + split["test"])
        assert not held & run.trained, f"{held & run.trained} are held out and were trained on: {self.told}"
        assert all(path.is_relative_to(run.directory) for path in changed), changed
        assert all(seen == (self.place / run.data, {*split["val"]}) for seen in self.validated), self.told
        assert all(last["split"][part]["names"] == split[part] for part in SPLITS)
        recorded = {"decoder_type" if name == "decoder" else name: value for name, value in last["flags"].items()}
        assert {name: config[name] for name in run.flags} == run.flags, f"{config} {self.told}"
        assert recorded == {name: config[name] for name in recorded}, self.told
        assert last["epoch"] == run.first + run.epochs and run.images <= {*split["train"]}, self.told
        if code == 143:
            return
        rows, curve, metric = run.json("metrics_history.json"), run.json("loss_curve.json"), config["best_metric"]
        assert run.epochs == config["epochs"] and run.images == {*split["train"]}, self.told
        assert all(len(values) == last["epoch"] for values in (rows, *curve.values())), self.told
        assert curve["learning_rates"][run.first :] == [config["learning_rate"]] * run.epochs, self.told
        score = [-loss for loss in curve["validation_losses"]] if metric == "val_loss" else [r["cider"] for r in rows]
        better = [n for n in range(run.since, len(rows)) if score[n] > max(score[run.since : n], default=-np.inf)]
        assert [n for n in range(run.first, len(rows)) if rows[n]["is_best"]] == [n for n in better if n >= run.first], (rows, score, run, self.told)
        named = (read_run(run.directory).best or {})["epoch"], load_checkpoint(run.directory / "best.pt")["epoch"]
        assert named == (better[-1] + 1, last["best"]["epoch"]) and named[0] == named[1], f"best: {named} {self.told}"

    def places(self, data: str) -> dict[str, Any]:
        folders = {"data_dir": data, "feature_cache": "cache", "model_save_dir": self.saved / "runs"}
        return {name: str(self.place / folder) for name, folder in folders.items()}

    @initialize(target=runs, data=data_sets, lists=new_lists, file=in_file, stop=stops, flags=told)
    def first(self, data, lists, file, stop, flags):
        return self.train(data, lists, file, stop, flags)

    @rule(target=runs, data=data_sets, lists=new_lists, file=in_file, stop=stops, flags=told)
    def train(self, data, lists, file, stop, flags):
        flags = MODEL | self.places(data) | flags
        return self.begin(data, lists, file, stop, None, flags, {n: v for n, v in flags.items() if n != "decoder"})

    @rule(target=runs, run=runs, last=switch, other=data_sets, lists=new_lists, file=in_file, stop=stops, flags=told)
    def go_on(self, run, last, other, lists, file, stop, flags):
        saved = load_checkpoint(find_checkpoint(run.model(last)))["flags"]  # best.pt may be of a run before
        kept = {name: saved[name] for name in (*MODEL, "best_metric", "seed") if name != "decoder"}
        way = {"model_path": [str(run.model(last))]} | self.places(other) | flags
        return self.begin(other, lists, file, stop, run, way, kept | flags | self.places(other))

    @rule(target=runs, run=runs, last=switch, data=data_sets, lists=new_lists, file=in_file, stop=stops, flags=told)
    def adapt(self, run, last, data, lists, file, stop, flags):
        flags = flags | self.places(data)
        return self.begin(data, lists, file, stop, run, {"init_from": str(run.model(last))} | flags, flags)

    @rule(target=runs, run=runs, lists=new_lists)
    def from_its_run_config(self, run, lists):
        """A file that a run wrote has its settings, but not what it was told to do."""
        config = run.json("run_config.json")
        if config["init_from"] is None:
            same = {name: value for name, value in config.items() if name not in NOT_CONFIGURABLE}
            way = {"config": str(run.directory / "run_config.json")}
            return self.begin(run.data, lists, "nothing", None, None, way, same)
        return multiple()

    @rule(target=runs, run=runs, data=st.none() | data_sets, file=in_file, stop=stops)
    def resume(self, run, data, file, stop):
        place = {"data_dir": str(self.place / data)} if data else {}
        code, changed = self.command(file, stop, resume=str(run.directory), **place)
        assert (code == 2) == (data not in (None, run.data)), self.told
        if code != 2:
            self.check(run, code, changed)
        return multiple()

    # ----------------------------------------------------------------------------------------------
    # What does not train

    @rule(target=runs, run=runs, last=switch, other=st.none() | data_sets, part=st.sampled_from(["val", "test"]), file=in_file)
    def test(self, run, last, other, part, file):
        data, model, split = other or run.data, run.model(last), run.json("split.json")
        flags = {"mode": "test", "model_path": [str(model)], "split": part, "beam_size": 1, "consensus": "off"}
        code, changed = self.command(file, **flags | ({"data_dir": str(self.place / data)} if other else {}))
        if data == run.data:
            assert (code == 2) == (not split[part]), f"trained and not tested: {self.told}"
        if code == 0:
            row, checkpoint = run.json("test_metrics.json")[-1], find_checkpoint(model)
            names = {entry["image_id"] for entry in run.json(row["captions_file"])}
            assert not contents(data, names) & run.trained and (data != run.data or names == {*split[part]}), self.told
            header = (checkpoint.name, load_checkpoint(checkpoint)["epoch"], part, len(names))
            assert tuple(row[key] for key in ("checkpoint", "epoch", "split", "images")) == header, self.told
            assert all(path.parent == run.directory for path in changed if path.suffix != ".yaml"), changed
        return multiple()

    @rule(target=runs, run=runs, last=switch, file=in_file)
    def write_folder(self, run, last, file):
        """Export a model; then refuse flags that contradict each other or the model."""
        output, model = Path(tempfile.mkdtemp(dir=self.saved)) / "exported", [str(run.model(last))]
        code, _ = self.command(file, mode="export", model_path=model, output=str(output))
        split = json.loads((output / "split.json").read_text())
        assert code == 0 and all(split[part]["names"] == run.json("split.json")[part] for part in SPLITS), self.told
        for flags in (
            {"resume": str(run.directory), "epochs": 3}, {"model_path": model, "init_from": model[0]},
            {"mode": "test"}, {"mode": "export", "model_path": model}, {"model_path": model, "hidden_size": 9},
        ):  # fmt: skip
            assert self.command(file, **flags)[0] == 2, self.told
        return multiple()


def try_sequences(place: Path, examples: int, steps: int, first: str | None = None) -> None:
    """Draw sequences of commands. Args: first: seed of others than the tests try."""
    machine: Any = type("Sequences", (Commands,), {"place": place})
    if first is not None:
        machine = seed(first)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=first is None, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),  # fmt: skip
    )


def test_what_runs_is_what_was_asked(tmp_path):
    draw_sets(tmp_path)
    try_sequences(tmp_path, 10, 10)
