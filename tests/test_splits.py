"""A split is settled once: no image that a model was trained on is scored."""

import numpy as np
import pytest

from captioning.data.dataset import load_caption_set
from captioning.data.splits import (
    drawn_split,
    equal_files,
    find_splits,
    listed_split,
    refuse_trained_images,
    same_split,
    store_split,
)
from captioning.io import UserError

NAMES = [f"IMG_{n}.jpg" for n in range(10)]
SIZES = [100 + n for n in range(10)]
VERSIONS = np.array([(size, 7 * size) for size in SIZES])
SPLITS = {"train": np.arange(6), "val": np.array([6, 7]), "test": np.array([8, 9])}
STORED = store_split(SPLITS, NAMES, VERSIONS, parent=None)


def found(names, sizes, stored, tmp_path, notes=None):
    splits, source = find_splits([tmp_path], names, sizes, 0, stored, [] if notes is None else notes)
    return {split: [names[i] for i in images] for split, images in splits.items()}, source


def test_the_stored_split_rules_over_lists_that_were_added_later(tmp_path):
    for name, images in (("train.txt", NAMES[4:]), ("val.txt", NAMES[2:4]), ("test.txt", NAMES[:2])):
        (tmp_path / name).write_text("\n".join(images))
    assert found(NAMES, SIZES, None, tmp_path)[0]["test"] == NAMES[:2]
    notes: list[str] = []
    (tmp_path / "val.txt").unlink()
    lists, source = found(NAMES, SIZES, STORED, tmp_path, notes)
    assert lists == {"train": NAMES[:6], "val": NAMES[6:8], "test": NAMES[8:]} and source == "the checkpoint"
    assert len(notes) == 1 and "6 image(s) are in another split" in notes[0], (
        "nothing is said of a list that rules nothing"
    )


@pytest.mark.parametrize(
    "files, expected, note",
    [
        ({"train": NAMES[:8], "test": NAMES[8:]}, {"test": NAMES[8:]}, "1 of the training list, drawn"),
        (
            {"val": NAMES[6:8], "test": NAMES[8:]},
            {"train": NAMES[:6], "val": NAMES[6:8]},
            "all that no other list names",
        ),
        ({"train": NAMES[:6], "val": NAMES[6:8]}, {"train": NAMES[:6], "test": []}, "none are tested"),
        ({"test": NAMES[8:]}, {"test": NAMES[8:]}, "1 of the training list, drawn"),
    ],
    ids=["no val", "no train", "no test", "test alone"],
)
def test_lists_hold_where_others_are_missing(tmp_path, files, expected, note):
    """Images of test.txt were trained on where there was no val.txt."""
    for name, images in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(images))
    notes: list[str] = []
    lists, _ = found(NAMES, SIZES, None, tmp_path, notes)
    assert {name: lists[name] for name in expected} == expected and any(note in each for each in notes)
    held = {name for part in ("val", "test") for name in files.get(part, [])}
    assert not held.intersection(lists["train"]) and not set(lists["val"]) & set(lists["test"]) and lists["val"]


def test_entries_with_a_folder_or_without_an_ending_match(tmp_path):
    for name, images in (("train", NAMES[:6]), ("val", NAMES[6:8]), ("test", NAMES[8:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"Images/{n}" if name == "val" else n[:-4] for n in images))
    lists, _ = found(NAMES, SIZES, None, tmp_path)
    assert (lists["train"], lists["val"], lists["test"]) == (NAMES[:6], NAMES[6:8], NAMES[8:])


def test_a_column_of_a_captions_file_is_used_as_lists_are(tiny):
    """It was passed over without a word, and its test images were trained on."""
    parts = ["train"] * 16 + ["dev", "dev", " Test", " Test"]
    rows = [f"p{number:02d}.jpg,{part},a dog, or two" for number, part in enumerate(parts)]
    file = tiny / "captions.txt"
    file.write_text("\n".join(["image,split,caption", *rows, *rows]))
    data = load_caption_set(tiny)
    assert [data.splits[split].tolist() for split in ("train", "val", "test")] == [[*range(16)], [16, 17], [18, 19]]
    assert data.split_source == f"the column split of {file}"
    (tiny / "train.txt").write_text("p00.jpg\np01.jpg\np02.jpg\nImages/absent.jpg")
    data = load_caption_set(tiny)
    assert data.split_source == f"train.txt in {tiny}", "lists rule over it"
    assert any("not in the data set, left out: Images/absent.jpg" in note for note in data.notes)
    (tiny / "train.txt").unlink()
    file.write_text("image,caption,split\np00.jpg,a dog,fold 3\n")
    with pytest.raises(UserError, match="line 2: the column split has 'fold 3': expected train, val, test"):
        listed_split([file])


def test_known_images_do_not_shrink_another_set_to_themselves(tmp_path):
    """One known image each in val and test left 70 others out."""
    names = [NAMES[0], NAMES[6], NAMES[8], *(f"own_{n}.jpg" for n in range(60))]
    sizes = [SIZES[0], SIZES[6], SIZES[8], *range(1000, 1060)]
    lists, source = found(names, sizes, STORED, tmp_path)
    assert sum(map(len, lists.values())) == 63 and "3 image(s) as in the checkpoint" in source
    assert NAMES[0] in lists["train"] and NAMES[6] in lists["val"] and NAMES[8] in lists["test"]


def test_equal_files_are_found_and_stay_together(tmp_path):
    """Copies in two parts could be trained on, and then neither tested nor resumed."""
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(b"same" if number in (1, 7) else b"%04d" % number)
    groups = equal_files(tmp_path, NAMES, [4] * 10)
    assert groups == [[NAMES[1], NAMES[7]]]
    for seed in range(20):
        lists, _ = drawn_split(NAMES, seed, groups)
        assert sorted(name for part in lists.values() for name in part) == NAMES
        assert sum(set(groups[0]) <= set(part) for part in lists.values()) == 1
    for name, images in (("train", NAMES[:6]), ("val", NAMES[6:8]), ("test", NAMES[8:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(images))
    notes: list[str] = []
    splits, _ = find_splits([tmp_path], NAMES, SIZES, 0, None, notes, lambda: groups)
    assert splits["train"].tolist() == [0, 2, 3, 4, 5] and NAMES[1] in notes[0] and len(notes) == 1


def test_images_that_came_or_went_are_named(tmp_path):
    notes: list[str] = []
    names, sizes = [*NAMES[1:], "new.jpg"], [*SIZES[1:], 5]
    lists, _ = found(names, sizes, STORED, tmp_path, notes)
    assert lists["train"] == NAMES[1:6] and not any("new.jpg" in part for part in lists.values())
    assert any("IMG_0.jpg" in note for note in notes) and any("new.jpg" in note for note in notes)


def test_other_images_under_the_same_names_are_another_data_set(tmp_path):
    notes: list[str] = []
    names = [*NAMES[:4], *(f"own_{n}.jpg" for n in range(16))]
    lists, source = found(names, [1] * 20, STORED, tmp_path, notes)
    assert source.startswith("drawn") and sum(map(len, lists.values())) == 20
    assert "other contents" in notes[0]


def test_the_same_data_set_encoded_anew_keeps_its_split(tmp_path):
    notes: list[str] = []
    lists, source = found(NAMES, [1] * 10, STORED, tmp_path, notes)
    assert source == "the checkpoint" and lists["test"] == NAMES[8:] and "10 image(s) have another size" in notes[0]


def test_a_download_that_has_more_images_keeps_the_split_too(tmp_path):
    """A newly drawn split would score the model on images that it was trained on."""
    notes: list[str] = []
    lists, source = found([*NAMES, "a.jpg", "b.jpg"], [1] * 12, STORED, tmp_path, notes)
    assert source == "the checkpoint" and lists["test"] == NAMES[8:] and "a.jpg" in notes[1]
    many = [f"IMG_{n}.jpg" for n in range(21)]  # a larger set may have the same names by chance
    assert found(many, [1] * 21, STORED, tmp_path)[1].startswith("drawn")


def test_a_model_is_not_scored_on_what_it_or_its_parent_was_trained_on():
    child = store_split({**SPLITS, "train": np.array([8])}, NAMES, VERSIONS, parent=STORED)
    assert child["inherited"]["names"] == NAMES[:6]
    grandchild = store_split({**SPLITS, "train": np.array([9])}, NAMES, VERSIONS, parent=child)
    assert set(grandchild["inherited"]["names"]) == {*NAMES[:6], NAMES[8]}
    for stored, trained in ((STORED, [0, 5]), (child, [3, 8]), (grandchild, [0, 8, 9])):
        for image in trained:
            with pytest.raises(UserError, match=f"was trained on 1 of the 2 images to score .IMG_{image}.jpg"):
                refuse_trained_images(stored, np.array([image, 6]), NAMES, VERSIONS, "m.pt")
        refuse_trained_images(stored, np.array([6, 7]), NAMES, VERSIONS, "m.pt")
    others = VERSIONS + 1  # other images that have the same names
    refuse_trained_images(STORED, np.arange(10), NAMES, others, "m.pt")


@pytest.mark.parametrize(
    "trained, scored, leaks",
    [
        ("1000268201.jpg", "1000268201_693b08cb0e.jpg", True),
        ("1000268201_693b08cb0e.jpg", "1000268201.jpg", True),
        ("36979.jpg", "36979_0123456789.jpg", True),
        ("1000268201.jpg", "1000268201.jpg", True),
        ("20240131.jpg", "20240131.jpg", False),
        ("0000268201.jpg", "0000268201.jpg", False),
        ("1000268201.png", "1000268201.png", False),
        ("1000268201_b.jpg", "1000268201.jpg", False),
        ("IMG_1.jpg", "IMG_1.jpg", False),
    ],
)
def test_a_photo_of_flickr_is_known_by_its_number(trained, scored, leaks):
    """929 of Flickr8k's 1,000 test images are in Flickr30k, as other files; elsewhere equal names say nothing."""
    stored = store_split({**SPLITS, "train": np.array([0])}, [trained, *NAMES[1:]], VERSIONS, parent=None)
    if leaks:
        with pytest.raises(UserError, match="was trained on 1 of the 1 images to score"):
            refuse_trained_images(stored, np.array([0]), [scored], np.array([[1, 1]]), "m.pt")
    else:
        refuse_trained_images(stored, np.array([0]), [scored], np.array([[1, 1]]), "m.pt")


def test_scores_are_compared_on_the_same_held_out_images_only():
    other = STORED | {"val": STORED["test"]}
    more = store_split({**SPLITS, "train": np.arange(5)}, NAMES, VERSIONS, parent=None)
    assert same_split(STORED, more) and not same_split(other, STORED)
