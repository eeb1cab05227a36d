"""What is trained on and held out, from every kind of data set; captions and their tokenizer; bad input by name."""

import itertools
import json
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from scaling.training import captions, corpus, tokenization
from sims.data import datasets

PLAN = {"duplicates": "5x4", "singles": 30}


def save_idx(folder, pictures, labels):
    folder.mkdir(parents=True)
    head = struct.pack(">4B3I", 0, 0, 8, 3, *pictures.shape)
    (folder / "train-images-idx3-ubyte").write_bytes(head + pictures.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of two classes."""
    random = np.random.default_rng(0)
    for i in range(10):
        place = tmp_path / "pictures" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(place / f"{i}.png")
    return tmp_path / "pictures"


def test_the_rows_are_those_of_the_sweeps():
    found = corpus.load("digits", **PLAN, seed=3)
    theirs = datasets.load("digits", **PLAN, seed=3)
    rows = corpus.training_rows(found)
    np.testing.assert_array_equal(found.rows[rows], theirs.train_rows)
    np.testing.assert_array_equal(found.images[rows].reshape(50, -1), theirs.train)
    np.testing.assert_array_equal(found.labels[rows], theirs.train_labels)
    assert found.counts.tolist() == [4] * 5 + [1] * 30
    assert (found.size, len(found.held_out), found.held_out.shape[1:]) == (1797, 1762, (1, 8, 8))


def test_membership_parts_the_data_set():
    found = corpus.load("digits", **PLAN)
    members = corpus.membership(found)
    assert [len(members[part]) for part in ("duplicated", "train", "held_out")] == [5, 30, 1762]
    assert sorted(itertools.chain(*members.values())) == list(range(1797))
    raw = datasets.load("digits", held_out=0)
    values = dict(zip(raw.train_rows.tolist(), raw.train, strict=True))
    for row, image in zip(members["duplicated"] + members["train"], found.images, strict=True):
        np.testing.assert_array_equal(values[row].reshape(1, 8, 8), image)
    json.dumps(members)


def test_sets_are_nested_and_offsets_disjoint():
    small, large = (corpus.load("digits", duplicates="", num_samples=n, held_out=100) for n in (20, 50))
    np.testing.assert_array_equal(large.rows[:20], small.rows)
    np.testing.assert_array_equal(large.held_out_rows, small.held_out_rows)
    other = corpus.load("digits", num_samples=50, offset=50, held_out=100)
    assert not set(other.rows) & set(large.rows)
    assert not (set(other.rows) | set(large.rows)) & set(large.held_out_rows)
    whole = corpus.load("digits")
    assert (len(whole.rows), len(whole.held_out)) == (1797 - 359, 359)
    assert set(corpus.load("digits", num_samples=50, seed=1).rows) != set(large.rows)


@pytest.mark.parametrize("seed", range(4))
def test_equal_pictures_are_one_image_that_is_repeated(tmp_path, seed):
    place, random = tmp_path / "repeated", np.random.default_rng(0)
    place.mkdir()
    pictures = random.integers(0, 256, (6, 4, 4), np.uint8)
    for name, i in enumerate([0, 1, 0, 2, 3, 0, 4, 5, 0, 0]):
        Image.fromarray(pictures[i]).save(place / f"{name}.png")
    found = corpus.load(str(place), num_samples=4, seed=seed)
    members = corpus.membership(found)
    assert sorted(itertools.chain(*members.values())) == list(range(10))
    side = [part for part, rows in members.items() if 0 in rows]
    assert all(set(members[part]) & {0, 2, 5, 8, 9} in (set(), {0, 2, 5, 8, 9}) for part in members)
    assert side in (["duplicated"], ["held_out"])
    assert (len(found.images), len(found.held_out), found.size) == (4, 2, 10)
    assert len(corpus.training_rows(found)) == (8 if side == ["duplicated"] else 4)
    named = corpus.load(str(place), duplicates="2x3", singles=2, seed=seed)
    assert max(named.counts) in (3, 5, 15)
    (tmp_path / "a.json").write_text(json.dumps([f"picture {i}" for i in range(10)]))
    with pytest.raises(ValueError, match="rows 0 and 2 are the same image, but have captions 'picture 0' and"):
        captions.from_file(found, tmp_path / "a.json")


def test_variants_differ_in_the_corner_alone():
    found = corpus.load("digits", duplicates="5x12", singles=3, variants="2x4")
    assert found.counts.tolist() == [12] * 3 + [3] * 8 + [1] * 3
    plain = corpus.load("digits", duplicates="5x12", singles=3)
    assert corpus.membership(found) == corpus.membership(plain)
    for i in range(2):
        group, image = found.images[3 + 4 * i : 7 + 4 * i], plain.images[3 + i]
        assert len(np.unique(group, axis=0)) == 4
        differs = np.any(group != image, axis=(0, 1))
        assert differs[6:, 6:].all()
        assert differs.sum() == 4
        assert set(found.rows[3 + 4 * i : 7 + 4 * i]) == {plain.rows[3 + i]}
    np.testing.assert_array_equal(found.images[-3:], plain.images[-3:])


def test_other_kinds_of_data_sets(tmp_path, folder, monkeypatch):
    pictures = np.random.default_rng(1).integers(0, 256, (12, 28, 28), np.uint8)
    save_idx(tmp_path / "share" / "datasets" / "fashion-mnist", pictures, np.arange(12, dtype=np.uint8) % 10)
    monkeypatch.setenv("XDG_DATA_DIRS", f"/nowhere:{tmp_path / 'share'}")
    fashion = corpus.load("fashion-mnist", num_samples=10, resolution=16)
    assert (fashion.images.shape, fashion.held_out.shape) == ((10, 1, 16, 16), (2, 1, 16, 16))
    assert fashion.classes[fashion.labels[0]] == corpus.FASHION_CLASSES[fashion.rows[0] % 10]
    own = corpus.load("fashion-mnist", num_samples=10)
    np.testing.assert_array_equal(own.images[0, 0], np.float32(pictures[own.rows[0]] / 127.5 - 1))
    # Resampling keeps the mean, up to the pixels that the filter weighs less at the edges.
    assert abs(fashion.images.mean() - own.images.mean()) < 0.02
    monkeypatch.setenv("XDG_DATA_DIRS", "/nowhere")
    with pytest.raises(ValueError, match="install the Debian package dataset-fashion-mnist"):
        corpus.load("fashion-mnist")

    np.savez(tmp_path / "a.npz", images=pictures[:, :8, :8], labels=np.arange(12) % 3)
    assert corpus.load(str(tmp_path / "a.npz"), duplicates="2x3", singles=4).images.shape == (6, 1, 8, 8)

    photos = corpus.load(str(folder), num_samples=7)
    assert (photos.images.shape, photos.classes) == ((7, 3, 8, 8), ("cat", "dog"))
    file = folder / photos.files[photos.rows[2]]
    np.testing.assert_array_equal(
        photos.images[2], np.float32(np.asarray(Image.open(file)) / 127.5 - 1).transpose(2, 0, 1)
    )
    assert photos.classes[photos.labels[2]] == file.parent.name
    assert corpus.load(str(folder), num_samples=7, gray=True, resolution=4).images.shape == (7, 1, 4, 4)


def test_bad_files_are_named_and_skipped_only_when_asked(folder):
    (folder / "cat" / "torn.png").write_bytes((folder / "cat" / "1.png").read_bytes()[:60])
    Image.new("RGB", (9, 8)).save(folder / "dog" / "wide.png")
    with pytest.raises(ValueError, match=r"2 of 12 images.*torn\.png is damaged.*wide\.png has.*--skip-bad"):
        corpus.load(str(folder), num_samples=7)
    kept = corpus.load(str(folder), num_samples=7, skip_bad=True)
    assert (kept.size, len(kept.files), len(kept.skipped)) == (10, 10, 2)
    assert "torn.png" in kept.skipped[0]
    (folder / "cat" / "torn.png").unlink()
    assert corpus.load(str(folder), num_samples=7, resolution=8).size == 11
    shutil.rmtree(folder)
    (folder / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        corpus.load(str(folder))
    (folder / "cat" / "torn.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 1 images"):
        corpus.load(str(folder), skip_bad=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duplicates": "1798x2"}, "digits has 1797 distinct rows, not the 1798 of 1798 images to repeat"),
        ({"duplicates": "20x60", "singles": 1800}, "not the 1820 of"),
        ({"duplicates": "0x3"}, "KxM"),
        ({"duplicates": "20"}, "20x60"),
        ({"duplicates": "20x60", "num_samples": 3}, "exclude one another"),
        ({"singles": 3}, "needs duplicates"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 1700, "offset": 98}, "an offset of 98"),
        ({"num_samples": 1700, "held_out": 98}, "98 held out"),
        ({"offset": 1797}, "not the"),
        ({"duplicates": "5x12", "variants": "6x4"}, "at most 5 can have variants"),
        ({"duplicates": "5x12", "variants": "2x5"}, "12 times"),
        ({"duplicates": "5x12", "variants": "few"}, "as in 10x4"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"gray": True}, "no folder of images"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus.load("digits", **arguments)


def test_bad_data(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((4, 64)))
    with pytest.raises(ValueError, match="are no images"):
        corpus.load(str(tmp_path / "flat.npy"))
    np.save(tmp_path / "bright.npy", np.full((4, 8, 8), 3.0))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        corpus.load(f"{tmp_path / 'bright.npy'}?values=keep")
    with pytest.raises(ValueError, match="there is no"):
        corpus.load(str(tmp_path / "nothing"))


def test_prompts_of_labels():
    found = corpus.load("digits", duplicates="6x4", singles=60, variants="2x4")
    named = captions.from_labels(found)
    assert [named.kinds.count(kind) for kind in captions.KINDS] == [10, 4, 2]
    texts = [named.prompts[i] for i in named.of]
    assert len(set(texts[:4])) == 4
    assert len(set(texts[4:12])) == 2
    assert texts[12] == f"a picture of {corpus.DIGIT_CLASSES[found.labels[12]]}"
    entries = {entry["prompt"]: entry for entry in captions.records(named, found)}
    assert entries[texts[4]] == {"prompt": texts[4], "kind": "template", "rows": [int(found.rows[4])]}
    assert sum(len(entry["rows"]) for entry in entries.values()) == 66
    many = corpus.load("digits", duplicates="300x2")
    assert captions.from_labels(many).kinds == ("verbatim",) * 300


def test_prompts_of_a_file(tmp_path, folder):
    found = corpus.load("digits", **PLAN)
    lines = [f"image {i}" for i in range(1797)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(json.dumps(lines))
    for name in ("a.txt", "a.json"):
        named = captions.from_file(found, tmp_path / name)
        assert [named.prompts[i] for i in named.of] == [f"image {row}" for row in found.rows]
        assert named.kinds == ("verbatim",) * 5 + ("shared",) * 30
    photos = corpus.load(str(folder), num_samples=7)
    entries = [{"file_name": file, "text": f"photo {file}"} for file in reversed(photos.files)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    named = captions.from_file(photos, tmp_path / "a.jsonl")
    assert named.prompts[named.of[3]] == f"photo {photos.files[photos.rows[3]]}"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*entries, entries[2]])))
    with pytest.raises(ValueError, match=rf"line 11: {entries[2]['file_name']} has a caption in an earlier line"):
        captions.from_file(photos, tmp_path / "a.jsonl")


def test_lines_belong_to_files_in_the_order_of_their_numbers(tmp_path):
    place = tmp_path / "numbered"
    place.mkdir()
    for i in range(1, 13):
        Image.new("L", (4, 4), i).save(place / f"{i}.png")
    photos = corpus.load(str(place), num_samples=9)
    assert photos.files[:4] == ("1.png", "10.png", "11.png", "12.png")
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(f"number {i}" for i in range(1, 13)))
    with pytest.warns(UserWarning, match=r"in the order of their numbers: 1\.png, 2\.png, 3\.png"):
        named = captions.from_file(photos, tmp_path / "a.txt")
    for image, prompt in enumerate(named.of):
        assert named.prompts[prompt] == f"number {photos.files[photos.rows[image]].removesuffix('.png')}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "one\ntwo", "2 captions do not match the 1797 images"),
        ("a.txt", "\n" * 1797, "not a text; 1797 captions are wrong"),
        ("a.json", "{}", "must hold a list"),
        ("a.json", "[1", "not valid .json"),
        ("a.json", json.dumps([3] * 1797), "is 3, not a text"),
        ("a.csv", "", "must be one of .txt, .json, .jsonl"),
        ("a.jsonl", "{}", "need a folder of images"),
    ],
)
def test_captions_that_do_not_match(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        captions.from_file(corpus.load("digits", **PLAN), tmp_path / name)


def test_captions_that_do_not_match_a_folder(tmp_path, folder):
    photos = corpus.load(str(folder), num_samples=7)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"file_name": "dog/0.png", "text": "dog"}) + '\n\n{"file_name": "x.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"no image for x\.png; no caption for cat/1\.png, .* and 6 more"):
        captions.from_file(photos, file)
    file.write_text('{"text": "dog"}')
    with pytest.raises(ValueError, match="line 1: must be an object with file_name and text"):
        captions.from_file(photos, file)
    with pytest.raises(ValueError, match="cannot be read"):
        captions.from_file(photos, tmp_path / "missing.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="no regular file"):
        captions.from_file(photos, tmp_path / "pipe.txt")


def test_a_caption_of_a_skipped_file_is_no_fault_and_one_of_a_similar_name_is(tmp_path, folder):
    (folder / "cat" / "torn.png").write_bytes(b"no image")
    photos = corpus.load(str(folder), num_samples=7, skip_bad=True)
    entries = [{"file_name": file, "text": file} for file in (*photos.files, "cat/torn.png")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert len(captions.from_file(photos, tmp_path / "a.jsonl").prompts) == 7
    entries[-1]["file_name"] = "orn.png"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(ValueError, match=r"no image for orn\.png"):
        captions.from_file(photos, tmp_path / "a.jsonl")


def test_a_folder_may_be_named_with_options(folder):
    plain = corpus.load(str(folder), num_samples=7, gray=True, resolution=4)
    for name, more in ((f"images:{folder}", {"gray": True, "resolution": 4}), (f"{folder}?color=gray&resize=4", {})):
        found = corpus.load(name, num_samples=7, **more)
        np.testing.assert_array_equal(found.images, plain.images)
        assert (found.files, found.classes) == (plain.files, plain.classes)
    assert corpus.load(f"images:{folder}?resize=6", num_samples=7, resolution=4).images.shape == (7, 3, 4, 4)
    (folder / "cat" / "torn.png").write_bytes(b"no image")
    assert len(corpus.load(f"images:{folder}?skip_bad=1", num_samples=7).skipped) == 1
    patched = corpus.load(f"patches:{folder}?size=4", num_samples=7, skip_bad=True)
    assert (patched.size, patched.files[1]) == (40, "cat/1.png:1")


def test_links_out_of_a_tokenizers_folder_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "vocab.json").symlink_to(tmp_path / "vocab.json")
    with pytest.raises(ValueError, match="outside the model's folder; copy the file there"):
        tokenization.copy_tokenizer(tmp_path / "linked", ["a"], tmp_path / "copy")


def test_the_tokenizer(tmp_path):
    prompts = [*captions.from_labels(corpus.load("digits", **PLAN)).prompts, ""]
    tokenizer = tokenization.fit_tokenizer(prompts, tmp_path / "a")
    assert type(tokenizer).__name__.startswith("CLIPTokenizer")
    ids = tokenization.encode(tokenizer, prompts)
    assert ids.shape == (len(prompts), 8)
    assert len({tuple(row) for row in ids}) == len(prompts)
    # Begin, a token for each word, end, padding.
    assert (ids[0] == ids[-1][1]).sum() == 8 - 1 - len(prompts[0].split())
    assert ids.max() == len(tokenizer) - 1 == tokenizer.eos_token_id
    for prompt, row in zip(prompts, ids, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True).strip() == prompt
    foreign = tokenizer("Ein Käfer, 3 €", truncation=False)["input_ids"]
    assert tokenizer.decode(foreign, skip_special_tokens=True).replace(" ", "") == "einkäfer,3€"
    assert tokenization.encode(tokenizer, ["word " * 50]).shape == (1, 8)

    longer = [f"{prompt} on a summer evening" for prompt in prompts]
    copied = tokenization.copy_tokenizer(tmp_path / "a", longer, tmp_path / "copy")
    assert (copied.model_max_length, len(copied)) == (24, len(tokenizer))
    with pytest.raises(ValueError, match=r"no vocab\.json"):
        tokenization.copy_tokenizer(tmp_path / "nothing", prompts, tmp_path / "b")


def test_the_same_prompts_make_the_same_tokenizer(tmp_path):
    # The library alone breaks ties at random: of these prompts in one of two ways.
    prompts = captions.from_labels(corpus.load("digits", duplicates="60x2", singles=1200)).prompts
    for i in range(8):
        tokenization.fit_tokenizer(prompts, tmp_path / str(i))
    made = [{file.name: file.read_bytes() for file in (tmp_path / str(i)).iterdir()} for i in range(8)]
    assert all(files == made[0] for files in made)
