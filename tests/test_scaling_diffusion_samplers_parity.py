"""Schedules and samplers beside the reference's, live: its defaults, tables, grids, steps and guided pipelines."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import scheduler_side  # noqa: E402
from scheduler_side import CLASSES, COSINE, DDPM, STABLE, TRAINED, ZERO_SNR  # noqa: E402
from torch_side import TOLERANCE, difference, randomize, to_params  # noqa: E402

from scaling.diffusion import flow, samplers, scheduler_fields, schedules  # noqa: E402
from scaling.diffusion.noise import noise_at  # noqa: E402
from scaling.diffusion.samplers import reverse, sample  # noqa: E402
from scaling.diffusion.schedules import METHODS, add_noise, from_config, target  # noqa: E402
from scaling.diffusion.solvers import make_solver  # noqa: E402
from scaling.models import model as api  # noqa: E402
from scaling.models.model import Condition  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SPACINGS = ("leading", "trailing", "linspace")


def scheduler(method, config=None):
    return getattr(diffusers, CLASSES[method]).from_config(config or {})


@pytest.fixture(autouse=True)
def _quiet():
    diffusers.logging.set_verbosity_error()


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_reference_s(method):
    signature = inspect.signature(getattr(diffusers, CLASSES[method]).__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "self"}
    ours = scheduler_fields.DEFAULTS[method] | scheduler_fields.NOISE_OF_CLASS.get(CLASSES[method], {})
    assert {name: ours[name] for name in theirs.keys() & ours.keys()} == {
        name: theirs[name] for name in ours & theirs.keys()
    }
    # What one class lacks is understood for all, or read by name from the configuration.
    assert ours.keys() - theirs.keys() <= {"rescale_betas_zero_snr", "sigma_min", "sigma_max"}
    assert theirs.keys() - ours.keys() <= scheduler_fields.KNOWN | {"variance_type"}


@pytest.mark.parametrize("name", schedules.OTHER_CLASSES)
def test_fields_of_other_classes_are_known(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    named = {field: value for field, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD}
    del named["self"]
    if not named:
        pytest.skip(f"{name} is a placeholder of diffusers here: a package that it needs is not installed")
    assert named.keys() <= scheduler_fields.KNOWN
    assert from_config({"_class_name": name}, "ddim").beta_end == named["beta_end"].default


@pytest.mark.parametrize("config", [DDPM, STABLE, COSINE, TRAINED, ZERO_SNR])
def test_tables(config):
    ours = from_config(config, "ddim")
    theirs = scheduler("ddim", config).alphas_cumprod.numpy()
    # A thousand float32 factors, each rounded by up to 6e-8.
    np.testing.assert_allclose(theirs, ours.alpha_bar, rtol=6e-5, atol=1e-12)
    module = importlib.import_module(diffusers.DDIMScheduler.__module__)
    with scheduler_side._doubled(module):
        np.testing.assert_allclose(
            scheduler("ddim", config).alphas_cumprod.numpy(), ours.alpha_bar, rtol=1e-10, atol=1e-15
        )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("method", METHODS)
def test_timesteps_and_starts_for_every_number_of_steps(method, spacing):
    config = STABLE | {"timestep_spacing": spacing, "steps_offset": 0}
    ours, theirs = from_config(config, method), scheduler(method, config)
    compared = 0
    # A consistency model has as many steps as it was distilled at, whatever the spacing.
    for number in range(1, 51) if method == "lcm" else [*range(1, 130), 150, 200, 250, 333, 499]:
        theirs.set_timesteps(number)
        solver = make_solver(ours, number)
        if spacing == "trailing" and theirs.timesteps[-1] < 0:
            # The reference's rounding can add a step at timestep -1.
            assert len(solver.calls.t) < len(theirs.timesteps)
            continue
        np.testing.assert_allclose(solver.calls.t, theirs.timesteps.numpy(), atol=1e-3)
        assert float(solver.start) == pytest.approx(float(theirs.init_noise_sigma), rel=3e-5)
        compared += 1
    assert compared == 50 if method == "lcm" else compared > 120


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("method", METHODS)
def test_steps_in_any_number(method, number):
    config = STABLE | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    noise = np.random.RandomState(2).standard_normal((2 * number + 2, *scheduler_side.SHAPE))
    states, _ = scheduler_side.reference(method, config, number, noise, dtype="float64")
    table = jnp.asarray(noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "noise_at", lambda key, item, call, shape, dtype: table[call, item])
        ours = reverse(
            jax.random.key(0),
            lambda x, t, step: scheduler_side.network(jnp, x, t.astype(x.dtype)),
            make_solver(from_config(config, method), number),
            scheduler_side.SHAPE,
            trajectory=True,
            dtype=jnp.float64,
        ).states
    np.testing.assert_allclose(ours, states, atol=1e-9 * np.max(np.abs(states)))


@pytest.mark.parametrize(
    ("of", "to"), [("pndm", "ddim"), ("ddim", "euler"), ("euler", "dpmsolver++"), ("ddpm", "heun")]
)
def test_another_scheduler_of_the_same_file(of, to):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    theirs = getattr(diffusers, CLASSES[to]).from_config(scheduler(of, config).config)
    ours = from_config({"_class_name": CLASSES[of]} | config, to)
    theirs.set_timesteps(20)
    np.testing.assert_allclose(make_solver(ours, 20).calls.t, theirs.timesteps.numpy(), atol=1e-3)
    for field in theirs.config.keys() & ours.__dict__.keys() - {"trained_betas"}:
        assert getattr(ours, field) == theirs.config[field], field


def test_noise_and_velocity(key):
    ours, theirs = from_config(STABLE | {"prediction_type": "v_prediction"}, "ddim"), scheduler("ddim", STABLE)
    x, noise = jax.random.normal(key, (2, 3, 2, 4, 4), jnp.float32)
    t = np.array([3, 400, 999])
    tensors = [torch.from_numpy(np.array(value)) for value in (x, noise, t)]
    assert difference(add_noise(ours, x, noise, t), theirs.add_noise(*tensors)) <= 2e-6
    assert difference(target(ours, x, noise, t), theirs.get_velocity(*tensors)) <= 2e-6


UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("pndm", {}),
        ("ddim", {"prediction_type": "v_prediction"}),
        ("euler", {"timestep_spacing": "leading"}),
        # Not at fractional timesteps, which the reference's float32 levels shift by a thousandth, as a network sees.
        ("heun", {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
        ("dpmsolver++", {"use_karras_sigmas": True}),
        ("ddpm", {}),
        ("euler_ancestral", {"timestep_spacing": "leading"}),
        ("unipc", {}),
        ("lms", {"timestep_spacing": "leading"}),
    ],
)
def test_guided_sampling_of_a_network(method, fields, key):
    module = randomize(diffusers.UNet2DConditionModel(**{k: v for k, v in UNET.items() if k[0] != "_"}), "float32")
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in UNET.items()}
    apply = api.parse_config(config)
    params = to_params(module.state_dict(), apply.parameters(), getattr(apply.module, "rename", lambda name: name))
    model = api.from_config(config, params)
    context = np.random.RandomState(0).standard_normal((2, 2, 5, 12)).astype(np.float32)
    number, scale, settings = 4, 3.0, STABLE | fields
    theirs, solver = scheduler(method, settings), make_solver(from_config(settings, method), number)
    theirs.set_timesteps(number)

    def drawn(call):
        return torch.from_numpy(np.stack([noise_at(key, i, call, (4, 8, 8), jnp.float32) for i in range(2)]))

    x = drawn(0) * theirs.init_noise_sigma
    home = importlib.import_module(type(theirs).__module__)
    states = []
    with torch.no_grad():
        for call, t in enumerate(theirs.timesteps):
            pair = theirs.scale_model_input(torch.cat([x, x]), t)
            out = module(pair, t, torch.from_numpy(np.concatenate(context))).sample
            uncond, cond = out.chunk(2)
            with scheduler_side._replaced(home, randn_tensor=lambda *_, call=call, **__: drawn(call + 1)):
                x = theirs.step(uncond + scale * (cond - uncond), t, x).prev_sample
            states.append(x.numpy())
    ours = sample(
        key,
        model,
        from_config(settings, method),
        2,
        number,
        condition=Condition(context=jnp.asarray(context[1])),
        unconditional=Condition(context=jnp.asarray(context[0])),
        guidance=scale,
        trajectory=True,
    )
    assert len(states) == len(solver.calls.t)
    for state, expected in zip(ours.states, states, strict=True):
        assert difference(state, expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_walked_as_by_the_reference(shift):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(9)
    solver = flow.make_solver(flow.from_config(dict(theirs.config) | {"_class_name": config["_class_name"]}), 9)
    np.testing.assert_allclose(solver.calls.t, theirs.timesteps.numpy(), rtol=1e-6)
    noise = np.random.RandomState(0).standard_normal(scheduler_side.SHAPE).astype("float32")
    x, states = torch.from_numpy(noise), []
    for t in theirs.timesteps:
        x = theirs.step(scheduler_side.network(torch, x, t), t, x).prev_sample
        states.append(x.numpy())
    found = reverse(
        jax.random.key(0),
        lambda x, t, step: scheduler_side.network(jnp, x, t),
        solver,
        noise.shape,
        init=jnp.asarray(noise),
        trajectory=True,
    ).states
    assert difference(found, np.stack(states)) <= TOLERANCE["float32"]
    # Its noisy images, at a timestep that it visits.
    t = theirs.timesteps[3:4]
    image = torch.ones(1, *noise.shape[1:])
    noisy = theirs.scale_noise(image, t, torch.from_numpy(noise[:1]))
    ours = flow.add_noise(flow.FlowSchedule(shift=shift), jnp.asarray(image.numpy()), jnp.asarray(noise[:1]), float(t))
    assert difference(ours, noisy) <= TOLERANCE["float32"]
