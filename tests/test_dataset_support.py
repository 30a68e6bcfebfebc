"""Layouts, splits by image, vocabulary and batches; runs under pytest and as a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import as_script
import numpy as np
import pytest

from captioning.data.batches import Collator
from captioning.data.dataset import EOS, SOS, build_vocabulary, load_caption_set, tokenize
from captioning.data.layouts import read_captions
from captioning.io import UserError


def test_tokens_are_lower_case_without_punctuation():
    words, ids, offsets = tokenize(["A dog's shirt, red.", "None of it!"])
    first, second = ([words[i] for i in ids[a:b]] for a, b in zip(offsets, offsets[1:], strict=False))
    assert first == ["a", "dog", "'s", "shirt", "red"] and second == ["none", "of", "it"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("captions.txt", 'image,caption\na.jpg,"A dog, big"\nb.jpg,A cat\n'),
        ("captions.txt", "image,caption\r\na.jpg,A dog, big\r\nb.jpg,A cat\r\n"),
        ("Flickr8k.token.txt", "a.jpg#0\tA dog, big\nb.jpg.1#0\tA cat\n"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| A dog, big\nb.jpg| 4   A cat\n"),
        ("results_20130124.token", "a.jpg#0\tA dog, big\nb.jpg#0\tA cat\n"),
        ("dataset.json", json.dumps({"images": [
            {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog, big"}]},
            {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "A cat"}]},
        ]})),
    ],
)  # fmt: skip
def test_layouts(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    captions, notes = read_captions(tmp_path / name)
    assert list(captions.columns) == ["image", "caption"] and not notes
    assert captions["image"].tolist() == ["a.jpg", "b.jpg"]
    assert captions["caption"].str.strip().tolist() == ["A dog, big", "A cat"]


def coco(folder: Path, karpathy: bool) -> Path:
    """Two training and six validation pictures (empty files) in COCO's folders, with Karpathy's file or COCO's own two."""
    numbers = {"train2014": (9, 25), "val2014": (42, 73, 74, 133, 136, 139)}
    images = []
    for part, ids in numbers.items():
        (folder / part).mkdir(parents=True)
        files = {number: f"COCO_{part}_{number:012d}.jpg" for number in ids}
        for name in files.values():
            (folder / part / name).touch()
        notes = [{"id": 10 * n + k, "image_id": n, "caption": f"picture {n} again"} for n in ids for k in range(2)]
        content = {"images": [{"id": n, "file_name": name} for n, name in files.items()], "annotations": notes}
        if not karpathy:
            (folder / "annotations").mkdir(exist_ok=True)
            (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
        for n, name in files.items():
            split = {9: "train", 25: "train", 42: "restval", 73: "val", 74: "val"}.get(n, "test")
            sentences = [{"raw": f"picture {n} again"}, {"raw": f"picture {n} again"}]
            images.append({"filepath": part, "filename": name, "cocoid": n, "split": split, "sentences": sentences})
    if karpathy:
        (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    return folder


def test_coco_with_karpathys_split(tmp_path):
    data = load_caption_set(coco(tmp_path / "coco", karpathy=True))
    ids = {split: [data.image_id(image) for image in images] for split, images in data.splits.items()}
    assert ids == {"train": [9, 25, 42], "val": [73, 74], "test": [133, 136, 139]}
    assert data.paths()[0] == tmp_path / "coco" / "train2014" / "COCO_train2014_000000000009.jpg"
    assert data.paths()[0].is_file() and data.references(0) == ["picture 9 again"] * 2


def test_cocos_own_files_come_in_two_and_its_validation_images_are_held_out(tmp_path):
    data = load_caption_set(coco(tmp_path / "coco", karpathy=False), seed=1)
    assert len(data.names) == 8 and data.first_caption[-1] == 16
    held = {data.image_id(image) for split in ("val", "test") for image in data.splits[split]}
    assert held == {42, 73, 74, 133, 136, 139} and len(data.splits["val"]) == len(data.splits["test"]) == 3
    assert [data.image_id(image) for image in data.splits["train"]] == [9, 25] and "Karpathy" in data.split_source
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(UserError, match="captions_val2014.json is not there"):
        load_caption_set(tmp_path / "coco")


@pytest.mark.parametrize("folder", ["..", "a/../..", "/etc", "a\\..", "a/b", "/"])
def test_a_caption_file_names_no_folder_elsewhere(tmp_path, folder):
    image = {"filepath": folder, "filename": "x.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(UserError, match="not a plain file name"):
        read_captions(tmp_path / "dataset_coco.json")


@pytest.mark.parametrize(
    "name, header, row",
    [
        ("captions.txt", "image,caption", "{}.jpg,{}"),
        ("Flickr8k.token.txt", "x.jpg#0\tx", "{}.jpg#0\t{}"),
        ("results.csv", "image_name| comment_number| comment", "{}.jpg| 0| {}"),
    ],
)
def test_words_for_missing_values_are_words(tmp_path, name, header, row):
    words = ["None", "NA", "null", "nan", "N/A", "3", "1e5", "True"]
    (tmp_path / name).write_text("\n".join([header, *(row.format(word, word) for word in words)]) + "\n")
    table, _ = read_captions(tmp_path / name)
    assert table["caption"].tolist()[-8:] == words and table["image"].tolist()[-8:] == [f"{word}.jpg" for word in words]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("captions.txt", 'image,caption\na.jpg,"a\ndog"\n\n../b.jpg,dog\n', "line 5: '../b.jpg' is not"),
        ("captions.txt", 'image,caption\na.jpg,"a\ndog"\nb.jpg\n', "line 4: expected 2 comma-separated fields"),
        ("Flickr8k.token.txt", "a.jpg#0\tdog\n\nb.jpg dog\n", "line 3: expected `image.jpg#0<TAB>caption`"),
        ("Flickr8k.token.txt", "a.jpg#0\tdog\n\n..#0\tdog\n", r"line 3: '\.\.' is not"),
        ("results.csv", "image_name| n| comment\n\na.jpg| dog\n", r"line 3: expected `image\| number\| caption`"),
        ("results.csv", "image_name| n| comment\n\n | 0| dog\n", "line 3: a row without an image name"),
    ],
)
def test_lines_are_counted_over_blank_ones_and_captions_of_several_lines(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.parametrize("script", ["test_lr_scheduling.py", "test_dataset_support.py", "test_unique_directories.py"])
def test_without_pytest_the_scripts_say_how_to_install_it(tmp_path, script):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('No module named pytest', name='pytest')")
    command = [sys.executable, str(Path(__file__).parent / script)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: the tests need pytest: python -m pip install pytest")


# --------------------------------------------------------------------------------------------------
# Images


def test_split_is_by_image_and_seeded(tiny):
    data = load_caption_set(tiny, seed=3)
    parts = [set(images.tolist()) for images in data.splits.values()]
    assert [len(part) for part in parts] == [16, 2, 2] and len(set.union(*parts)) == 20
    again = load_caption_set(tiny, seed=3)
    assert all((data.splits[s] == again.splits[s]).all() for s in data.splits)
    assert any((data.splits[s] != load_caption_set(tiny, seed=4).splits[s]).any() for s in ("val", "test"))


def test_an_image_in_two_splits_is_refused(tiny):
    for name, images in (("train", "p00.jpg\np01.jpg"), ("val", "p02.jpg"), ("test", "p01.jpg")):
        (tiny / f"{name}.txt").write_text(images)
    with pytest.raises(UserError, match="'p01.jpg' is in both train and test"):
        load_caption_set(tiny)


def test_vocabulary_is_from_training_captions_only(tiny):
    for name, images in (("train", "p00.jpg\np04.jpg"), ("val", "p01.jpg"), ("test", "p02.jpg")):
        (tiny / f"{name}.txt").write_text(images)
    words = build_vocabulary(load_caption_set(tiny), 1).words
    assert words[:4] == ["<PAD>", "<SOS>", "<EOS>", "<UNK>"] and "red" in words and "green" not in words


def test_references_are_the_images_own(tiny):
    data = load_caption_set(tiny)
    for position, name in enumerate(data.names):
        color = ("red", "green", "blue", "yellow")[int(name[1:3]) % 4]
        second = "two" if int(name[1:3]) % 8 < 4 else "three"
        assert data.references(position) == [f"a {color} picture number {word}" for word in ("one", second)]


def test_batches_hold_whole_images_and_no_padding(tiny):
    data = load_caption_set(tiny)
    vocabulary = build_vocabulary(data, 1)
    collator = Collator(data, vocabulary, max_length=40)
    plan = collator.plan(data.splits["train"], 5)
    assert all(len(captions) <= 5 for captions in plan) and sum(map(len, plan)) == 32
    batch = collator.collate(plan[0])
    sizes = batch.batch_sizes.tolist()
    assert sum(sizes) == len(batch.inputs) == len(batch.targets) and sizes == sorted(sizes, reverse=True)
    assert (batch.inputs[: sizes[0]] == SOS).all() and (batch.targets == EOS).sum() == sizes[0]
    assert len(np.unique(batch.slots)) == len(batch.slots)
    row = [int(t) for t, r in zip(batch.targets, batch.token_row, strict=True) if r == 0]
    image = int(batch.images[batch.row_image[0]])
    assert " ".join(vocabulary.decode(row)) in data.references(image)


def test_missing_images_are_an_error_or_a_note(tiny):
    (tiny / "Images" / "p03.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 20 images .* missing"):
        load_caption_set(tiny)


if __name__ == "__main__":
    sys.exit(as_script.run(__file__))
