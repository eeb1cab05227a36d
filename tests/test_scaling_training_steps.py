"""The training step against what can be told without it; runs in folders: killed, resumed, refused, diverged."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling_commands
from sklearn.datasets import load_digits

import scaling
from scaling.bridge.weights import read_header
from scaling.diffusion import schedules
from scaling.training import architectures as designs
from scaling.training import corpus
from scaling.training import run as trainer
from scaling.training import steps as training
from scaling.training.run import TrainSpec, train

ROOT = pathlib.Path(__file__).parents[1]
DIT = TrainSpec(
    arch="dit", channels=(8,), layers=1, heads=2, patch_size=4, duplicates="3x4", singles=20, batch_size=4, steps=25
)
SMALL = ["--duplicates", "3x4", "--singles", "20", "--batch-size", "4", "--quiet"]
FLAGS = ["--arch", "dit", "--channels", "8", "--layers", "1", "--heads", "2", "--patch-size", "4", *SMALL]


def run(*argv):
    """The exit code of a command in this process."""
    return scaling_commands.run("train", *argv)


draw = jax.jit(training.draw, static_argnums=(2, 3))
loss_of = jax.jit(training.denoising_loss, static_argnums=1)


def recipe(dropout=0.0, **changes):
    return dataclasses.replace(TrainSpec(**changes).recipe(), dropout=dropout)


def weights(folder):
    """The parts of what was trained, by file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def dit():
    """A network whose output is zero before training, and ten images, one of them repeated."""
    config = designs.network_config("dit", (1, 8, 8), channels=(8,), heads=2, patch_size=4)
    model = jax.jit(lambda key: training.initial_weights(scaling.initialize(key, config)))(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (10, 1, 8, 8), jnp.float32, -1, 1)
    rows = jnp.asarray([0] * 7 + list(range(1, 10)), jnp.int32)
    return model, training.Examples(images, rows, jnp.zeros(10, jnp.int32), jnp.int32(1))


@pytest.fixture(scope="module")
def step():
    return jax.jit(training.train_step, static_argnames=("networks", "recipe", "sharding"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, never disturbed."""
    return train(DIT, tmp_path_factory.mktemp("done"), save_every=10)


def networks(model, prediction="epsilon"):
    schedule = schedules.from_config(designs.scheduler_config(prediction=prediction))
    return training.Networks(model.apply, None, schedule)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_loss_of_a_network_that_returns_zero(key, dit, prediction):
    model, examples = dit
    nets = networks(model, prediction)
    batch = draw(key, examples, nets.schedule, recipe(batch_size=16))
    loss = loss_of({"network": model.params}, nets, batch)
    power = nets.schedule.alpha_bar[np.asarray(batch.t)].reshape(-1, 1, 1, 1)
    x, noise = np.float64(batch.images), np.float64(batch.noise)
    velocity = np.sqrt(power) * noise - np.sqrt(1 - power) * x
    expected = {"epsilon": noise, "sample": x, "v_prediction": velocity}[prediction]
    np.testing.assert_allclose(loss, np.mean(expected**2), rtol=1e-5)


def test_draws_are_what_they_say(dit):
    _, examples = dit
    schedule = schedules.from_config(designs.scheduler_config())
    how = recipe(batch_size=20_000, dropout=0.25)
    batch = draw(jax.random.key(3), examples, schedule, how)
    few = draw(jax.random.key(3), examples, schedule, dataclasses.replace(how, batch_size=3))
    for whole, part in zip(batch, few, strict=True):
        np.testing.assert_array_equal(whole[:3], part)
    match = np.all(np.asarray(batch.images)[:, None] == np.asarray(examples.images)[None], axis=(2, 3, 4))
    assert match.any(axis=1).all()
    # Four standard errors of shares of 7/16 and 1/4; the largest is 0.0035.
    assert abs(match[:, 0].mean() - 7 / 16) < 0.015
    assert abs(np.mean(np.asarray(batch.condition) == 1) - 0.25) < 0.013
    assert (batch.t.min(), batch.t.max()) == (0, 999)
    assert abs(np.mean(np.asarray(batch.t)) - 499.5) < 4 * 289 / np.sqrt(20_000)
    assert abs(np.mean(np.square(batch.noise)) - 1) < 4 * np.sqrt(2 / (64 * 20_000))


def test_a_step_follows_adam(key, dit, step):
    """From zero moments Adam moves each weight by the learning rate times the sign of its gradient."""
    model, examples = dit
    nets, how = networks(model), recipe(batch_size=4, warmup=5, ema=0.9)
    state = training.start({"network": model}, how)
    after, loss = step(state, key, examples, networks=nets, recipe=how)
    batch = draw(jax.random.fold_in(key, 0), examples, nets.schedule, how)
    gradient_of = jax.jit(jax.value_and_grad(training.denoising_loss), static_argnums=1)
    value, gradient = gradient_of({"network": model.params}, nets, batch)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    gradient = np.asarray(gradient["network"]["proj_out_2.bias"])
    moved = np.asarray(after.params["network"]["proj_out_2.bias"])
    np.testing.assert_allclose(moved, -(1e-3 / 5) * np.sign(gradient), rtol=1e-3)
    # Short of memory at first: the decay of the first average is 1/10.
    np.testing.assert_allclose(after.ema["network"]["proj_out_2.bias"], 0.9 * moved, rtol=1e-5)
    assert int(after.step) == 1


def test_clipping_and_weight_decay():
    clipped = training.optimizer(recipe(clip=1e-3))
    params = {"w": jnp.ones(4, jnp.float32)}
    decayed = training.optimizer(recipe(optimizer="adamw", weight_decay=0.5))
    with jax.numpy_dtype_promotion("standard"):
        state = clipped.init(params)
        _, state = clipped.update({"w": jnp.full(4, 7.0, jnp.float32)}, state, params)
        moments = jax.tree.leaves(state)
        updates, _ = decayed.update({"w": jnp.zeros(4, jnp.float32)}, decayed.init(params), params)
    # A tenth of the clipped gradient, whose four entries have the norm 1e-3.
    assert any(np.allclose(moment, 0.1 * 5e-4, rtol=1e-5) for moment in moments)
    np.testing.assert_allclose(updates["w"], -1e-3 * 0.5, rtol=1e-6)


def test_many_steps_in_one_program(key, dit, step):
    model, examples = dit
    nets, how = networks(model), recipe(batch_size=4, warmup=5, ema=0.9)
    state = training.start({"network": model}, how)
    losses = []
    for _ in range(3):
        state, loss = step(state, key, examples, networks=nets, recipe=how)
        losses.append(float(loss))
    many = jax.jit(training.advance, static_argnames=("networks", "recipe", "max_steps"))
    start = training.start({"network": model}, how)
    other, same = many(start, key, examples, 3, networks=nets, recipe=how, max_steps=5)
    np.testing.assert_allclose(same[:3], losses, rtol=1e-5)
    assert np.isnan(same[3:]).all()
    assert int(other.step) == 3
    # Three steps of at most 1e-3: what rounding of a gradient near 0 can turn is its sign.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other.params, state.params)


def test_it_compiles_for_accelerators(dit):
    model, examples = dit
    how = recipe(batch_size=4)
    many = jax.jit(training.advance, static_argnames=("networks", "recipe", "max_steps"))
    shapes = jax.eval_shape(lambda: (training.start({"network": model}, how), jax.random.key(0), examples, 3))
    traced = many.trace(*shapes, networks=networks(model), recipe=how, max_steps=5)
    traced.lower(lowering_platforms=("tpu", "cuda"))


def test_initial_weights_have_the_variance_of_pytorch():
    config = designs.network_config("unet2d", (1, 8, 8))

    def params(key):
        return training.initial_weights(scaling.initialize(key, config)).params

    assert sum(value.size for value in jax.eval_shape(params, jax.random.key(0)).values()) == 701_345
    # One of them: the others are not compiled.
    value = jax.jit(lambda key: params(key)["mid_block.resnets.0.conv1.weight"])(jax.random.key(0))
    np.testing.assert_allclose(np.var(value), 1 / (3 * 9 * 64), rtol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate has 1 non-finite"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"prompt_dropout": -0.1, "arch": "dit"}, "dropout must be"),
        ({"optimizer": "sgd"}, "adam, adamw; got 'sgd'"),
        ({"weight_decay": 0.1}, "needs the optimizer adamw"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"arch": "vit"}, "arch must be one of"),
    ],
)
def test_bad_specs(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainSpec(**arguments)


@pytest.mark.parametrize(
    ("arch", "shape", "arguments", "message"),
    [
        ("unet2d", (1, 9, 8), {}, "images of 9x8 cannot be halved 1 times.*a multiple of 2, as 8"),
        ("unet2d", (1, 2, 2), {"channels": (8, 8, 8)}, "cannot be halved 2 times"),
        ("unet2d", (1, 8, 8), {"channels": ()}, "at least one number"),
        ("unet2d_condition", (1, 8, 8), {"heads": 7}, "must divide the 64 channels"),
        ("dit", (1, 8, 8), {}, "a DiT has one width"),
        ("dit", (1, 8, 8), {"channels": (12,)}, "of its 8 heads"),
        ("dit", (1, 8, 6), {"channels": (64,)}, "takes squares"),
        ("dit", (1, 9, 9), {"channels": (64,)}, "another resolution, as 8"),
        ("gan", (1, 8, 8), {}, "arch must be one of"),
    ],
)
def test_networks_that_do_not_fit(arch, shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        designs.network_config(arch, shape, **arguments)


def test_a_run_says_how_many_rows_repeat(tmp_path, capsys):
    table = load_digits()
    order = [*range(1797), 5, 5, 7]
    np.savez(tmp_path / "a.npz", images=table.images[order], labels=table.target[order])
    name = f"npz:{tmp_path / 'a.npz'}?values=0:16"
    spec = dataclasses.replace(DIT, dataset=name, steps=1)
    found = trainer.read_corpus(spec)
    # Repeated rows are held out here, so that shapes are those of the other tests.
    assert not {5, 7} & set(found.rows)
    assert set(corpus.membership(found)["held_out"]) >= {5, 7, 1797, 1798, 1799}
    flags = [flag for flag in FLAGS if flag != "--quiet"]
    assert run(*flags, "--dataset", name, "--steps", "1", "--out", tmp_path / "run") == 0
    assert "3 rows of the data set repeat an earlier one" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "training.json").read_text())["repeats"] == 3


def test_a_run_leaves_a_pipeline(done):
    assert "repeats" not in json.loads((done / "training.json").read_text())
    members = json.loads((done / "membership.json").read_text())
    assert members == corpus.membership(trainer.read_corpus(DIT))
    assert [len(members[part]) for part in ("duplicated", "train", "held_out")] == [3, 20, 1774]
    pipeline = scaling.load_pipeline(done)
    assert pipeline.network.apply.architecture == "dit"
    assert trainer.read_spec(done) == DIT
    record = json.loads((done / "training.json").read_text())
    assert record["sessions"][0]["device"]["platform"] == "cpu"
    assert [at for at, _ in record["loss"]] == list(range(1, 26))
    assert np.isfinite([loss for _, loss in record["loss"]]).all()
    # What is kept is the average, and that has moved away from the weights before training.
    state = {name: tensor.read() for name, tensor in read_header(done / "checkpoint.safetensors").items()}
    name = "pos_embed.proj.weight"
    kept = np.asarray(pipeline.network.params[name])
    np.testing.assert_array_equal(kept, state[f".ema['network']['{name}']"])
    assert np.any(kept != state[f".params['network']['{name}']"])


def test_an_interrupted_run_goes_on_bit_for_bit(done, tmp_path):
    def interrupt(now, total, label):
        del total, label
        if now == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(DIT, tmp_path, save_every=10, on_steps=interrupt)
    assert not (tmp_path / "model_index.json").exists()
    told = []
    train(DIT, tmp_path, save_every=10, on_steps=lambda now, total, label: told.append((now, total, label)))
    assert [now for now, _, _ in told] == [20, 25]
    assert told[0][2].startswith("loss ")
    assert weights(tmp_path) == weights(done)
    assert len(json.loads((tmp_path / "training.json").read_text())["sessions"]) == 2


def test_more_steps_continue_and_other_specs_are_refused(done, tmp_path, monkeypatch):
    train(dataclasses.replace(DIT, steps=7), tmp_path / "a")
    assert trainer.read_spec(tmp_path / "a").steps == 7
    train(DIT, tmp_path / "a", save_every=10)
    assert weights(tmp_path / "a") == weights(done)
    with pytest.raises(ValueError, match="has 25 steps already, more than 24"):
        train(dataclasses.replace(DIT, steps=24), tmp_path / "a")
    with pytest.raises(ValueError, match="another training run: spec learning_rate is 0.001 there and 0.1 here"):
        train(dataclasses.replace(DIT, learning_rate=0.1), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        train(DIT, tmp_path / "b")
    # Another run's checkpoint put into the folder, and a torn one.
    train(dataclasses.replace(DIT, seed=1, steps=1), tmp_path / "c")
    checkpoint = tmp_path / "a" / "checkpoint.safetensors"
    own = checkpoint.read_bytes()
    checkpoint.write_bytes((tmp_path / "c" / checkpoint.name).read_bytes())
    with pytest.raises(ValueError, match="is the checkpoint of another training run"):
        train(DIT, tmp_path / "a")
    # One bit of a weight: the file is as long and as well formed as before.
    flipped = bytearray(own)
    flipped[len(own) // 2] ^= 1
    checkpoint.write_bytes(flipped)
    with pytest.raises(ValueError, match="do not match its checksum"):
        train(DIT, tmp_path / "a")
    checkpoint.write_bytes(own)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated or damaged"):
        train(DIT, tmp_path / "a")


def test_seeds_and_other_data_make_other_runs(done, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).uniform(-1, 1, (30, 8, 8)).astype(np.float32))
    spec = dataclasses.replace(DIT, dataset=str(tmp_path / "a.npz"), steps=2)
    first = train(spec, tmp_path / "first")
    moved = dataclasses.replace(spec, dataset=str((tmp_path / "a.npz").rename(tmp_path / "b.npz")))
    assert weights(train(moved, first)) == weights(first)
    np.savez(tmp_path / "b.npz", images=np.zeros((30, 8, 8)))
    with pytest.raises(ValueError, match="has 1 distinct rows, not the 23 of 3 images to repeat"):
        train(moved, first)
    np.savez(tmp_path / "b.npz", images=np.random.default_rng(1).uniform(-1, 1, (30, 8, 8)))
    with pytest.raises(ValueError, match="data images is"):
        train(moved, first)
    other = train(dataclasses.replace(moved, seed=1, ema=0.0), tmp_path / "other")
    assert weights(other) != weights(first)
    # Without an average the weights themselves are kept.
    state = read_header(other / "checkpoint.safetensors")
    name = "pos_embed.proj.bias"
    kept = scaling.load_model(other, "transformer").params[name]
    np.testing.assert_array_equal(kept, state[f".params['network']['{name}']"].read())


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = trainer._advanced

    def spoiled(state, *rest):
        state, losses = real(state, *rest)
        return state, np.where(np.arange(len(losses)) + int(state.step) - len(losses) >= 13, np.nan, losses)

    monkeypatch.setattr(trainer, "_advanced", spoiled)
    with pytest.raises(ValueError, match="after 13 steps the loss is no longer finite; the last good state is in"):
        train(DIT, tmp_path / "a", save_every=10)
    state = read_header(tmp_path / "a" / "checkpoint.safetensors")
    assert int(state[".step"].read()) == 10
    assert not (tmp_path / "a" / "model_index.json").exists()
    with pytest.raises(ValueError, match="there is no checkpoint yet"):
        train(DIT, tmp_path / "b", save_every=20)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    # One step of this size takes the weights to infinity, of which no loss before it can tell.
    spec = dataclasses.replace(DIT, learning_rate=1e38, optimizer="adamw", weight_decay=100.0, steps=1)
    with pytest.raises(ValueError, match="after 1 steps the loss is no longer finite; there is no checkpoint"):
        train(spec, tmp_path / "a")


def test_the_command(tmp_path, capsys):
    assert run(*FLAGS, "--steps", 3, "--out", tmp_path / "a", "--save-every", 2) == 0
    assert capsys.readouterr() == ("", "")
    assert run(*[flag for flag in FLAGS if flag != "--quiet"], "--steps", 4, "--out", tmp_path / "a") == 0
    printed = capsys.readouterr()
    assert "membership.json" in printed.out
    assert "4/4" in printed.err
    assert "loss " in printed.err
    assert run(*FLAGS, "--steps", 2, "--out", tmp_path / "a") == 2
    assert "4 steps already" in capsys.readouterr().err
    for flags, message in [
        (["--dataset", "nowhere"], "there is no 'nowhere'"),
        (["--resolution", "9"], "another resolution, as 8"),
        (["--num-samples", "9"], "exclude one another"),
        (["--devices", "99"], "devices must be at most"),
        (["--save-every", "0"], "save_every must be at least 1"),
    ]:
        assert run(*FLAGS, "--steps", 1, "--out", tmp_path / "b", *flags) == 2, flags
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "prediction"),
    [("unet2d", "v_prediction"), ("unet2d_condition", "epsilon")],
)
@pytest.mark.slow
def test_unets_train_and_sample(arch, prediction, tmp_path):
    spec = TrainSpec(
        arch=arch,
        prediction=prediction,
        channels=(8,),
        heads=2,
        text_channels=8,
        text_layers=1,
        duplicates="4x4",
        variants="2x2",
        singles=20,
        batch_size=4,
        steps=6,
    )
    train(spec, tmp_path / "a", save_every=3)
    pipeline = scaling.load_pipeline(tmp_path / "a")
    prompt = None
    if arch == "unet2d_condition":
        prompts = json.loads((tmp_path / "a" / "prompts.json").read_text())
        assert [entry["kind"] for entry in prompts[:4]] == ["verbatim", "verbatim", "template", "template"]
        prompt = prompts[0]["prompt"]
        # The text encoder is trained along.
        state = read_header(tmp_path / "a" / "checkpoint.safetensors")
        name = "text_model.final_layer_norm.bias"
        assert np.any(state[f".params['text_encoder']['{name}']"].read() != 0)
    condition = scaling.condition_on(pipeline, prompt) if prompt else None
    out = scaling.sample(jax.random.key(0), pipeline.network, pipeline.schedule, 2, 2, condition=condition)
    assert out.x.shape == (2, 1, 8, 8)
    assert np.isfinite(out.x).all()


def command(out, steps, every, **environment):
    """The command in a process of its own."""
    argv = [sys.executable, "-m", "scaling", "train", *FLAGS, "--out", str(out), "--steps", str(steps)]
    return subprocess.Popen(
        [*argv, "--save-every", str(every)], cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    assert command(tmp_path / "a", 400, 20).wait(timeout=300) == 0
    process = command(tmp_path / "b", 400, 20)
    checkpoint = tmp_path / "b" / "checkpoint.safetensors"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(read_header(checkpoint)[".step"].read())
    assert 20 <= reached < 400
    assert command(tmp_path / "b", 400, 20).wait(timeout=300) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path):
    for count in (1, 2):
        process = command(tmp_path / str(count), 10, 10, JAX_NUM_CPU_DEVICES=str(count))
        assert process.wait(timeout=300) == 0, process.stderr.read()
    one, two = (
        {name: tensor.read() for name, tensor in read_header(tmp_path / str(n) / "checkpoint.safetensors").items()}
        for n in (1, 2)
    )
    record = json.loads((tmp_path / "2" / "training.json").read_text())
    assert record["sessions"][0]["device"]["count"] == 2
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-4)
    # Two other batches of the same size would differ by their noise.
    assert np.std(one["losses"]) > 1e-2
