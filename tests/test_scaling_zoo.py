"""The models that come with the package: what their cards say, what they hold, and that their recipes make them."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from scaling_commands import parse, run

from scaling import zoo
from scaling.bridge.weights import read_header
from scaling.commands import train as train_command
from scaling.measures.copies import Copies
from scaling.study.examination import sampled_prompts
from scaling.training import corpus
from scaling.training.captions import from_labels
from scaling.training.run import RECORD, TrainSpec, read_corpus
from scaling.zoo import packing

pytestmark = pytest.mark.optimized

DETECTED = ("digits", "captioned-digits", "fashion", "captioned-fashion", "fashion-dit")
"""Models that detectors are scored on."""


def spec_of(name):
    return train_command.spec_from_flags(parse("train", *zoo.recipe(name), "--out", "unused"))


def files(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", zoo.names())
def test_a_model_is_what_its_recipe_says(name):
    pipeline, spec = zoo.load(name), spec_of(name)
    card = json.loads((zoo.folder(name) / "card.json").read_text())
    models = (pipeline.network, *pipeline.text_encoders)
    assert sum(value.size for model in models for value in model.params.values()) == card["parameters"]
    assert all(value.dtype == jnp.float32 for model in models for value in model.params.values())
    assert pipeline.network.apply.architecture == spec.arch
    assert (card["flags"], card["steps"], card["seed"]) == (zoo.recipe(name), spec.steps, spec.seed)
    assert card["difference"] <= packing.TOLERANCE
    text = (zoo.folder(name) / "README.md").read_text()
    assert "trained by the authors" in text
    assert f"python -m scaling train {' '.join(zoo.recipe(name))}" in text


@pytest.mark.parametrize("name", [name for name in zoo.names() if "digits" in name])
def test_membership_is_that_of_the_data(name):
    found = read_corpus(spec_of(name))
    assert zoo.membership(name) == corpus.membership(found)
    assert set(zoo.membership(name)["held_out"]).isdisjoint(found.rows.tolist())


def test_models_are_small_and_stored_in_half_precision():
    sizes = {name: files(zoo.folder(name)) for name in zoo.names()}
    assert max(sizes.values()) < 3e6
    assert sum(sizes.values()) < 20e6
    for weights in pathlib.Path(zoo.__file__).parent.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in read_header(weights).values()} == {"F16"}


def test_there_is_enough_to_score_detectors_on():
    for name in DETECTED:
        assert len(zoo.membership(name)["duplicated"]) >= 40
        assert len(zoo.membership(name)["held_out"]) >= 60
    for name in ("captioned-digits", "captioned-fashion"):
        kinds = [prompt["kind"] for prompt in zoo.prompts(name)]
        assert kinds.count("verbatim") >= 10
        assert kinds.count("template") >= 10
        assert kinds.count("shared") >= 2
    assert zoo.prompts("digits") == []


def test_unknown_names_are_refused(capsys):
    with pytest.raises(ValueError, match="no model 'cifar'; it has digits"):
        zoo.load("cifar")
    assert run("zoo", "cifar") == 2
    assert run("zoo", "--out", "somewhere") == 2
    assert "needs the name" in capsys.readouterr().err


def test_the_command_lists_all_and_shows_a_card(capsys):
    assert run("zoo") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(zoo.names())
    assert run("zoo", "digits-10") == 0
    assert capsys.readouterr().out.startswith("# digits-10")


@pytest.mark.slow
def test_a_recipe_trains_and_packs(tmp_path, monkeypatch):
    tiny = "--num-samples 6 --held-out 20 --channels 8 --batch-size 2 --steps 2"
    monkeypatch.setattr(zoo, "RECIPES", {"tiny": tiny})
    monkeypatch.setattr(packing, "SAMPLES", 3)
    monkeypatch.setattr(packing, "SAMPLER_STEPS", 2)
    assert run("zoo", "tiny", "--quiet", "--out", tmp_path) == 0
    trained, packed = (
        read_header(tmp_path / part / "unet/diffusion_pytorch_model.safetensors") for part in ("training", "tiny")
    )
    assert trained.keys() == packed.keys()
    for name, tensor in packed.items():
        np.testing.assert_array_equal(tensor.read(), trained[name].read().astype(np.float16))
    card = json.loads((tmp_path / "tiny/card.json").read_text())
    assert 0 < card["difference"] < packing.TOLERANCE
    assert (card["training_rows"], card["copies"]["total"], card["flags"]) == (6, 3, tiny.split())
    assert spec_of("tiny") == TrainSpec(
        num_samples=6, held_out=20, duplicates="", singles=0, channels=(8,), batch_size=2, steps=2
    )
    # Where half precision would change too much, weights stay as they are.
    monkeypatch.setattr(packing, "TOLERANCE", 0.0)
    packing.pack(tmp_path / "training", tmp_path / "wide", "tiny", tiny.split())
    wide = read_header(tmp_path / "wide/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {"F32"}


def test_a_run_that_was_cut_is_not_packed(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"steps": 4}))
    with pytest.raises(ValueError, match="is not finished"):
        packing.pack(tmp_path, tmp_path / "out", "cut", [])


def test_cards_tell_whose_prompts_bring_copies_back():
    card = json.loads((zoo.folder("captioned-digits") / "card.json").read_text())
    for name in packing.ETAS:
        by_kind = card[name]["by_kind"]
        assert sum(count for count, _ in by_kind.values()) == card[name]["count"]
        assert sum(total for _, total in by_kind.values()) == card[name]["total"] == packing.SAMPLES
        # Those of one image bring it back, those that many images share do not.
        assert by_kind["shared"][0] == 0
        assert min(count / total for kind, (count, total) in by_kind.items() if kind != "shared") > 0.8


def test_copies_are_counted_by_the_kind_of_their_prompt(monkeypatch):
    spec = spec_of("captioned-digits")
    found = read_corpus(spec)
    captions = from_labels(found)
    asked = np.asarray(captions.kinds)[sampled_prompts(captions, packing.SAMPLES)]

    def draw(key, pipeline, corpus, captions, count, num_steps, eta):
        copied = (asked == "verbatim") if eta else (asked == "shared")
        ones = np.ones(count)
        return None, Copies(np.zeros(count, int), ones, ones, ones, copied)

    monkeypatch.setattr(packing, "draw_samples", draw)
    facts = packing._facts(zoo.load("captioned-digits"), spec, found)
    totals = {kind: int(np.sum(asked == kind)) for kind in ("shared", "template", "verbatim")}
    for name, copied in (("copies", "shared"), ("copies_with_fresh_noise", "verbatim")):
        assert facts[name]["by_kind"] == {kind: [n * (kind == copied), n] for kind, n in totals.items()}
        # The first image is a repeated one.
        assert facts[name]["of_repeated"] == facts[name]["count"] == totals[copied]
