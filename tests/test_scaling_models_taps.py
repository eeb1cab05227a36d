"""Taps: each kind of edit against its formula, layouts, order, refusals, what is traced and what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network

from scaling.models import model as api
from scaling.models.taps import Edit, Tap, names

TINY = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}
DETECTOR_TAP = "up_blocks.0.resnets.1.nonlinearity"


def edited(x, *edits, name="layer"):
    """What a layer with output x, in PyTorch's layout, becomes."""
    image = x.ndim == 4
    tap = Tap(capture=(name,), edits={name: edits})
    out = tap(name, jnp.moveaxis(x, 1, -1) if image else x)
    np.testing.assert_array_equal(tap.taps[name], jnp.moveaxis(out, -1, 1) if image else out)
    return np.asarray(tap.taps[name])


@pytest.fixture
def image(key):
    return jax.random.normal(key, (2, 3, 4, 5))


@pytest.fixture
def v(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (3,))


def test_add_scale_and_replace_follow_their_formulas(image, v):
    column = np.asarray(v)[None, :, None, None]
    x = np.asarray(image)
    np.testing.assert_allclose(edited(image, Edit("add", v, 0.7)), x + 0.7 * column, rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(edited(image, Edit("scale", v)), x * column, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(edited(image, Edit("scale", v, 0.5)), x * (1 + column) / 2, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(edited(image, Edit("replace", v)), column + 0 * x, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        edited(image, Edit("replace", v, 0.25)), 0.75 * x + 0.25 * column, rtol=1e-13, atol=1e-15
    )


def test_project_out_removes_the_direction_and_only_it(image, v):
    out = edited(image, Edit("project_out", v))
    np.testing.assert_allclose(np.einsum("bchw,c->bhw", out, v), 0, atol=1e-14)
    removed = np.asarray(image) - out
    # What went is parallel to v at every position, and its length does not depend on v's.
    along = np.einsum("bchw,c->bhw", np.asarray(image), v) / np.sum(np.square(v))
    np.testing.assert_allclose(removed, along[:, None] * np.asarray(v)[None, :, None, None], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(edited(image, Edit("project_out", 1e3 * v)), out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_project_out_survives_half_precision_at_any_length(image, v, dtype):
    exact = edited(image, Edit("project_out", v))
    for length in (1e-2, 1e2):
        # Squares of these entries leave the range of float16.
        out = edited(image.astype(dtype), Edit("project_out", (length * v).astype(dtype)))
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(float), exact, atol=16 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("kind", ["add", "scale", "replace", "project_out"])
def test_strength_0_changes_nothing(image, v, kind):
    np.testing.assert_array_equal(edited(image, Edit(kind, v, 0.0)), image)


def test_strength_per_example_and_as_a_mask(image, v):
    full = edited(image, Edit("add", v))
    per_example = edited(image, Edit("add", v, jnp.array([0.0, 1.0])))
    np.testing.assert_array_equal(per_example[0], image[0])
    np.testing.assert_array_equal(per_example[1], full[1])
    mask = jnp.zeros((1, 1, 4, 5)).at[..., 2, 3].set(1)
    masked = edited(image, Edit("add", v, mask))
    np.testing.assert_array_equal(masked[..., 2, 3], full[..., 2, 3])
    np.testing.assert_array_equal(
        np.delete(masked.reshape(2, 3, 20), 13, -1), np.delete(image.reshape(2, 3, 20), 13, -1)
    )


def test_tokens_and_vectors_have_their_channels_last(key):
    for shape in [(2, 6, 3), (2, 3)]:
        x = jax.random.normal(jax.random.fold_in(key, len(shape)), shape)
        np.testing.assert_allclose(edited(x, Edit("add", jnp.arange(3.0))), np.asarray(x) + np.arange(3.0))


def test_a_value_of_the_activations_rank_is_in_pytorchs_layout(image):
    value = jnp.arange(3.0 * 5).reshape(1, 3, 1, 5)
    np.testing.assert_allclose(edited(image, Edit("add", value)), np.asarray(image) + value, rtol=1e-15)


def test_edits_of_one_layer_act_in_their_order(image, v):
    first_add = edited(image, Edit("add", v), Edit("scale", jnp.array(2.0)))
    np.testing.assert_allclose(first_add, edited(image, Edit("scale", jnp.array(2.0)), Edit("add", 2 * v)), rtol=1e-12)
    assert np.max(np.abs(first_add - edited(image, Edit("scale", jnp.array(2.0)), Edit("add", v)))) > 0.1


def test_the_last_call_of_a_name_wins():
    tap = Tap(capture=("twice",))
    tap("twice", jnp.zeros((1, 2)))
    tap("twice", jnp.ones((1, 2)))
    np.testing.assert_array_equal(tap.taps["twice"], np.ones((1, 2)))


def of_kind(kind):
    edit = Edit("add", np.ones(3))
    # The suite's type checks would refuse it first.
    object.__setattr__(edit, "kind", kind)
    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("add", np.ones(4)), r"value of shape \(4,\).*\(3,\)"),
        (Edit("add", np.ones((3, 1))), "value of shape"),
        (Edit("add", np.ones((2, 3, 4, 6))), "value of shape"),
        (Edit("add", np.ones(3), np.ones(3)), r"strength of shape \(3,\)"),
        (Edit("project_out", np.ones((1, 3, 1, 1))), "needs a vector"),
        (of_kind("rotate"), "unknown kind 'rotate'.*project_out"),
    ],
)
def test_a_bad_edit_is_refused_by_its_name(image, edit, message):
    with pytest.raises(ValueError, match=f"'layer'.*{message}"):
        edited(image, edit)


def test_a_string_is_no_sequence_of_names():
    with pytest.raises(ValueError, match=r"write \('mid_block',\)"):
        Tap(capture="mid_block")


def test_unknown_names_are_refused_with_the_nearest():
    model, x = network(TINY), jnp.zeros((1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"no tap named 'mid_blok'.*'mid_block'"):
        model.apply(model.params, x, 3, capture=("mid_blok",))
    with pytest.raises(ValueError, match=r"'up_blocks\.0\.resnets\.1\.nonlinearity'"):
        model.apply(model.params, x, 3, edits={"up_blocks.0.resnets.1.nonlinearty": Edit("add", 1.0)})


def test_names_have_the_shapes_that_are_captured():
    model = network(TINY)
    shapes = names(model)
    assert {name: value.shape for name, value in shapes.items() if name in ("conv_in", "mid_block", "conv_out")} == {
        "conv_in": (1, 8, 8, 8),
        "mid_block": (1, 16, 4, 4),
        "conv_out": (1, 3, 8, 8),
    }
    x = jax.ShapeDtypeStruct((3, 3, 16, 8), jnp.float32)
    shapes = names(model, x, jax.ShapeDtypeStruct((3,), jnp.float32))
    _, taps = jax.eval_shape(lambda x: model.apply(model.params, x, 5, capture=tuple(shapes)), x)
    assert {name: (tap.shape, tap.dtype) for name, tap in taps.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }
    # Listed in order of computation.
    order = list(shapes)
    assert order.index("conv_in") < order.index("mid_block") < order.index(DETECTOR_TAP) < order.index("conv_out")


def test_captures_are_after_edits_and_change_what_follows():
    model, x = network(TINY), jnp.ones((1, 3, 8, 8))
    plain, before = model.apply(model.params, x, 3, capture=("mid_block", DETECTOR_TAP))
    edits = {"mid_block": Edit("add", jnp.ones(16), 2.0)}
    out, after = model.apply(model.params, x, 3, capture=("mid_block", DETECTOR_TAP), edits=edits)
    np.testing.assert_allclose(after["mid_block"], before["mid_block"] + 2, rtol=1e-6)
    assert np.max(np.abs(after[DETECTOR_TAP] - before[DETECTOR_TAP])) > 1e-2
    assert np.max(np.abs(out - plain)) > 1e-3


def test_an_early_capture_computes_less():
    model = network(TINY)
    x = jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32)

    def operations(keep):
        # What XLA counts in the compiled program.
        compiled = jax.jit(lambda x: keep(model.apply(model.params, x, 3, capture=("conv_in", DETECTOR_TAP)))).lower(x)
        return compiled.compile().cost_analysis()["flops"]

    whole = operations(lambda result: result)
    late, early = operations(lambda result: result[1][DETECTOR_TAP]), operations(lambda result: result[1]["conv_in"])
    # conv_in is 3·8·9 multiplications and additions at 64 pixels and a bias.
    assert early <= 1.1 * (2 * 3 * 8 * 9 + 8) * 64
    assert early < 0.1 * late
    assert late < 0.8 * whole


def test_new_values_strengths_times_and_seeds_do_not_recompile(key):
    model = network(TINY)

    def run(t, value, strength):
        x = jax.random.normal(jax.random.fold_in(key, int(10 * t)), (1, 3, 8, 8), jnp.float32)
        edits = {"mid_block": Edit("add", value, strength)}
        return model.apply(model.params, x, jnp.float32(t), capture=("mid_block",), edits=edits)[0]

    run(1.0, jnp.ones(16), jnp.float32(1.0))
    compiled = api._run._cache_size()
    outs = [run(t, t * jnp.ones(16), jnp.float32(t)) for t in (2.0, 3.0)]
    # Another model of the same configuration is the same function.
    network(TINY).apply(model.params, jnp.ones((1, 3, 8, 8), jnp.float32), jnp.float32(7), capture=("mid_block",),
                        edits={"mid_block": Edit("add", jnp.zeros(16), jnp.float32(0))})  # fmt: skip
    assert api._run._cache_size() == compiled
    assert np.max(np.abs(outs[0] - outs[1])) > 1e-3


@pytest.mark.slow
def test_derivatives_in_value_and_strength(key):
    model = network(TINY, "float64")
    x, v = jax.random.normal(key, (1, 3, 8, 8)), jax.random.normal(jax.random.fold_in(key, 1), (16,))

    @jax.jit
    def out(v, strength):
        return jnp.sum(model.apply(model.params, x, 3, edits={"mid_block": Edit("add", v, strength)})[0])

    slope_v, slope_s = jax.grad(out, argnums=(0, 1))(v, 0.3)
    # Both enter through strength · v alone, so that the slopes are those of one vector.
    np.testing.assert_allclose(slope_s, jnp.vdot(slope_v, v) / 0.3, rtol=1e-10)
    step = 1e-5
    np.testing.assert_allclose(slope_s, (out(v, 0.3 + step) - out(v, 0.3 - step)) / (2 * step), rtol=1e-6)


def test_an_edit_is_a_pytree_with_a_static_kind():
    leaves, structure = jax.tree.flatten(Edit("add", jnp.ones(3), 0.5))
    assert len(leaves) == 2
    assert structure != jax.tree.structure(Edit("scale", jnp.ones(3), 0.5))
    stacked = jax.vmap(lambda s: Tap(edits={"a": Edit("add", jnp.ones(2), s)})("a", jnp.zeros((1, 2))))(jnp.arange(3.0))
    np.testing.assert_array_equal(stacked, np.repeat(np.arange(3.0), 2).reshape(3, 1, 2))
