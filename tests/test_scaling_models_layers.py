"""Layers: the CPU's own routines against the plain ones, and each formula against another way to compute it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from scaling.models import blocks_resnet, cpu_convolution, layers
from scaling.models.config import ParamSpec, jax_shape, to_jax, to_torch
from scaling.models.taps import Tap


def draw(key, *shape, dtype="float64"):
    """Normal numbers from NumPy: those of JAX would be compiled for every shape."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(random.standard_normal(shape), dtype)


@pytest.fixture
def plain(monkeypatch):
    """Runs a function with the routines of other devices."""

    def run(function, *args):
        with monkeypatch.context() as context:
            for module in (layers, cpu_convolution):
                context.setattr(module, "cpu_aware", lambda: False)
            return function(*args)

    return run


def attention(*qkv):
    """Three heads, in one program, compiled anew: it depends on what a test has patched."""
    return jax.jit(lambda *qkv: layers.attention(*qkv, heads=3))(*qkv)


@pytest.mark.parametrize(
    ("tokens", "context"), [(1, 1), (5, 77), (255, 3), (256, 16), (257, 16), (600, 600)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("chunk_from", [0, layers.CHUNK_FROM])
def test_chunked_attention_is_attention(key, plain, tokens, context, chunk_from, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_FROM", chunk_from)
    q, k, v = (draw(jax.random.fold_in(key, i), 2, n, 12) for i, n in enumerate((tokens, context, context)))
    out, other = np.asarray(attention(q, k, v)), plain(attention, q, k, v)
    np.testing.assert_allclose(out, other, rtol=0, atol=1e-6)
    # The logits in float64 by hand.
    q, k, v = (np.asarray(x)[..., :4] for x in (q, k, v))
    logits = np.einsum("btc,bsc->bts", q, k) / 2
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[..., :4], weights @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_from", [0, layers.CHUNK_FROM])
def test_chunked_attention_has_its_derivatives(key, chunk_from, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_FROM", chunk_from)
    q, k, v = (draw(jax.random.fold_in(key, i), 1, n, 4) for i, n in enumerate((300, 5, 5)))

    @jax.jit
    def run(*qkv):
        return layers.attention(*qkv, heads=2)

    check_grads(run, (q, k, v), order=1, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_from", [0, layers.CHUNK_FROM])
def test_causal_attention_does_not_look_ahead(key, chunk_from, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_FROM", chunk_from)
    q, k, v = (draw(jax.random.fold_in(key, i), 1, 6, 4, dtype="float32") for i in range(3))
    full = layers.attention(q, k, v, heads=2, causal=True)
    np.testing.assert_allclose(full[:, 0], v[:, 0], rtol=1e-6)
    short = layers.attention(q[:, :4], k[:, :4], v[:, :4], heads=2, causal=True)
    np.testing.assert_allclose(full[:, :4], short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chunk_from", [0, layers.CHUNK_FROM])
def test_attention_of_large_values_is_finite_in_half_precision(key, dtype, chunk_from, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_FROM", chunk_from)
    # The sum of 600 values, of which attention takes the mean, overflows float16.
    v = jnp.full((1, 600, 4), 1000.0, dtype)
    for size in (0, 100):
        q, k = (size * draw(jax.random.fold_in(key, i), 1, n, 4).astype(dtype) for i, n in enumerate((300, 600)))
        out = layers.attention(q, k, v, heads=2)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype("float32"), 1000.0, rtol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [16, 40, 72, 80, 160])
@pytest.mark.parametrize("chunk_from", [0, layers.CHUNK_FROM])
def test_attention_in_half_precision_loses_no_more_than_its_inputs(key, width, chunk_from, causal, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_FROM", chunk_from)
    for dtype, tolerance in (("float16", 3e-4), ("bfloat16", 2e-3)):
        # Large queries, as in trained networks: one more rounding of the logits would show.
        scales = (4.0, 1.0, 1.0)
        q, k, v = (s * draw(jax.random.fold_in(key, i), 2, 64, 2 * width) for i, s in enumerate(scales))
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = jax.jit(functools.partial(layers.attention, heads=2, causal=causal))(q, k, v)
        q, k, v = (np.asarray(x.astype("float64")).reshape(2, 64, 2, width) for x in (q, k, v))
        logits = np.einsum("bthc,bshc->bhts", q, k) / math.sqrt(width)
        if causal:
            logits = np.where(np.tri(64, dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        exact = np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v).reshape(2, 64, -1)
        difference = np.sqrt(np.mean(np.square(np.asarray(out.astype("float64")) - exact)) / np.mean(np.square(exact)))
        assert difference < tolerance, (dtype, difference)


@pytest.mark.parametrize("derivative", [False, True])
def test_attention_never_holds_more_than_a_chunk_of_the_matrix(derivative):
    tokens, heads, channels = 4096, 8, 40
    x = jax.ShapeDtypeStruct((1, tokens, heads * channels), jnp.float32)
    run = functools.partial(layers.attention, heads=heads)
    if derivative:
        run = jax.grad(lambda q, k, v: jnp.sum(layers.attention(q, k, v, heads=heads)), argnums=(0, 1, 2))
    memory = jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    chunk, operand = layers.QUERY_CHUNK * tokens * 4, tokens * heads * channels * 4
    # Some copies of a chunk (logits, weights, their slopes) and of the operands; the whole matrix is 128 chunks.
    assert memory < 4 * chunk + 10 * operand
    assert memory < 0.2 * heads * tokens**2 * 4


ROUTES = cpu_convolution.ROUTES


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [
        *((3, 1, (1, 1)), (3, 1, (0, 2)), (4, 1, (2, 1)), (5, 1, (1, 3)), (3, 1, (0, 0)), (3, 2, (1, 1))),
        *((3, 2, (0, 1)), (3, 2, (0, 0)), (1, 2, (0, 0)), (4, 3, (2, 0))),
    ],
)
def test_convolution_by_products_and_its_derivatives(key, kernel, stride, pad):
    """Values, gradients, forward mode, and second derivatives by forward over reverse, on odd sizes."""
    x, w, dx, dw = (
        draw(jax.random.fold_in(key, i), *shape) for i, shape in enumerate(2 * [(2, 7, 6, 3), (kernel, kernel, 3, 4)])
    )

    @functools.partial(jax.jit, static_argnums=0)
    def everything(route, x, w, dx, dw):
        def gradient(x, w):
            return jax.grad(lambda x, w: jnp.sum(jnp.sin(ROUTES[route](x, w, stride, pad))), argnums=(0, 1))(x, w)

        value, along = jax.jvp(lambda x, w: ROUTES[route](x, w, stride, pad), (x, w), (dx, dw))
        return value, along, *jax.jvp(gradient, (x, w), (dx, dw))

    results = {route: jax.tree.leaves(everything(route, x, w, dx, dw)) for route in ROUTES}
    expected = results.pop("native")
    assert results.keys() == {"product", "product_derivatives"}
    # Sums of at most 48 products of size 1, and of the curvature 100 of those.
    for route, leaves in results.items():
        for ours, theirs in zip(leaves, expected, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-11, err_msg=route)


def test_derivatives_are_products_even_where_values_are_not(key):
    x, w = draw(key, 1, 5, 5, 3), draw(jax.random.fold_in(key, 1), 3, 3, 3, 4)

    def run(x, w):
        return ROUTES["product_derivatives"](x, w, 1, (1, 1))

    def convolutions(function, *args):
        text = str(jax.jit(function).trace(*args).lower().as_text())
        return text.count("stablehlo.convolution")

    assert convolutions(run, x, w) == 1
    assert convolutions(jax.grad(lambda x, w: jnp.sum(run(x, w)), argnums=(0, 1)), x, w) == 0
    # The derivative in x alone does not need the columns of x, so nothing but x and w is stored for it.
    _, pullback = jax.vjp(lambda x: run(x, w), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= x.size + w.size


@pytest.mark.parametrize(
    ("x", "weight", "route"),
    [
        # The small UNet of a training run; its output is thin.
        ((64, 8, 8, 64), (3, 3, 64, 64), "product"),
        ((64, 8, 8, 1), (3, 3, 1, 32), "product"),
        ((64, 8, 8, 32), (3, 3, 32, 1), "product_derivatives"),
        ((64, 16, 16, 64), (3, 3, 64, 64), "product_derivatives"),
        ((1, 17, 16, 256), (3, 3, 256, 256), "product_derivatives"),
        ((64, 28, 28, 64), (3, 3, 64, 64), "product_derivatives"),
        ((64, 48, 48, 64), (3, 3, 64, 64), "native"),
        # Stable Diffusion at its lower and upper levels, and its autoencoder.
        ((2, 16, 16, 1280), (3, 3, 1280, 1280), "product"),
        ((8, 64, 64, 320), (3, 3, 320, 320), "native"),
        ((1, 64, 64, 320), (3, 3, 320, 320), "product_derivatives"),
        ((1, 512, 512, 128), (3, 3, 128, 128), "native"),
    ],
)
def test_the_route_of_a_convolution_goes_by_its_shapes(x, weight, route, plain, monkeypatch):
    assert cpu_convolution.conv_route(x, weight, 1, (1, 1)) == route
    assert plain(cpu_convolution.conv_route, x, weight, 1, (1, 1)) == "native"

    def run(x, weight):
        return layers.conv({"a.weight": weight}, Tap(), "a", x)

    shapes = jax.ShapeDtypeStruct(x, jnp.float32), jax.ShapeDtypeStruct(weight, jnp.float32)
    text = str(jax.make_jaxpr(run)(*shapes))
    assert ("conv_general_dilated" in text) == (route != "product")
    assert ("custom_jvp" in text) == (route != "native")


def test_one_set_of_columns_serves_both_arguments(key):
    """The backward pass gathers the cotangent alone, and stores nothing but the arguments themselves."""
    x, w = draw(key, 2, 6, 5, 3), draw(jax.random.fold_in(key, 1), 3, 3, 3, 4)
    cotangent = draw(jax.random.fold_in(key, 2), 2, 6, 5, 4)
    _, pullback = jax.vjp(lambda x, w: ROUTES["product"](x, w, 1, (1, 1)), x, w)
    stored = {leaf.size for leaf in jax.tree.leaves(pullback)}
    assert max(stored) <= max(x.size, w.size)
    # In the compiled program, where what is common is computed once: 3 columns, then 3 of those, of the cotangent.
    text = jax.jit(pullback).lower(cotangent).compile().as_text()
    widest = [line for line in text.splitlines() if "concatenate" in line and "f64[2,6,5,36]" in line.split("=")[1]]
    assert len(widest) == 1
    assert not any("f64[2,6,5,27]" in line for line in text.splitlines())


def test_convolution_by_hand(key):
    x, w = draw(key, 1, 4, 5, 2), draw(jax.random.fold_in(key, 1), 3, 3, 2, 3)
    out = np.asarray(layers.conv({"a.weight": w}, Tap(), "a", x, stride=2, padding=(0, 1)))
    padded = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 1), (0, 0)))
    assert out.shape == (1, 2, 2, 3)
    for i in range(2):
        for j in range(2):
            patch = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            np.testing.assert_allclose(out[0, i, j], np.einsum("hwi,hwio->o", patch, w), rtol=1e-12)


@functools.partial(jax.jit, static_argnames=("groups", "eps"))
def group_norm(params, x, groups, eps):
    return layers.group_norm(params, Tap(), "a", x, groups=groups, eps=eps)


def test_group_norm_has_zero_mean_and_unit_variance_in_each_group(key):
    x = 100 + 3 * draw(key, 2, 4, 5, 12)
    params = {"a.weight": jnp.ones(12), "a.bias": jnp.zeros(12)}
    out = np.asarray(group_norm(params, x, 3, 1e-8)).reshape(2, 20, 3, 4)
    np.testing.assert_allclose(np.mean(out, axis=(1, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(np.var(out, axis=(1, 3)), 1, rtol=1e-8)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_norms_are_computed_in_float32_at_least(key, norm):
    # A mean 100 times the deviation: bfloat16 itself has 3 digits.
    x = (100 + draw(key, 1, 64, 8, dtype="float32")).astype(jnp.bfloat16)
    params = {"a.weight": jnp.ones(8, jnp.bfloat16), "a.bias": jnp.zeros(8, jnp.bfloat16)}

    @jax.jit
    def run(x, params):
        if norm == "layer":
            return layers.layer_norm(params, Tap(), "a", x, eps=1e-5)
        return layers.group_norm(params, Tap(), "a", x, groups=2, eps=1e-5)

    exact = run(x.astype(jnp.float64), jax.tree.map(lambda p: p.astype(jnp.float64), params))
    out = run(x, params)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), exact, rtol=2**-8, atol=2**-8)


def test_a_constant_group_is_normalized_to_its_bias(key):
    """Its variance is zero: epsilon keeps it finite."""
    params = {"a.weight": draw(key, 4), "a.bias": jnp.arange(4.0)}
    out = group_norm(params, jnp.full((1, 2, 2, 4), 3.0), 2, 1e-5)
    np.testing.assert_allclose(out, np.broadcast_to(np.arange(4.0), out.shape), atol=1e-12)


def test_activations_have_their_definitions():
    x = np.linspace(-6, 6, 101)
    sigmoid = 1 / (1 + np.exp(-x))
    phi = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    tanh = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    expected = {
        "silu": x * sigmoid,
        "swish": x * sigmoid,
        "gelu": x * phi,
        "gelu-approximate": x * tanh,
        "relu": np.maximum(x, 0),
        "mish": x * np.tanh(np.log1p(np.exp(x))),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
    }
    assert expected.keys() == layers.ACTIVATIONS.keys()
    ours = jax.jit(lambda x: {name: function(x) for name, function in layers.ACTIVATIONS.items()})(x)
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [8, 9, 320])
def test_sinusoids(channels, flip, shift):
    t = np.array([0.0, 1.0, 37.5, 999.0])
    out = layers.sinusoidal_embedding(jnp.asarray(t), channels, flip_sin_to_cos=flip, freq_shift=shift)
    half = channels // 2
    phase = t[:, None] * 10000.0 ** (-np.arange(half) / (half - shift))
    first, second = (np.cos, np.sin) if flip else (np.sin, np.cos)
    expected = np.concatenate([first(phase), second(phase), np.zeros((4, channels % 2))], axis=1)
    assert out.dtype == np.float32
    # A phase of 999 with a relative error of some 2⁻²⁴ in each of frequency, product and exponent (of size ln 10000).
    np.testing.assert_allclose(out, expected, rtol=0, atol=999 * 2**-24 * (2 + math.log(10000)))


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (5, 4), (11, 12)])
def test_upsampling_takes_the_pixel_at_the_same_fraction(size):
    x = np.arange(4.0 * 5).reshape(1, 4, 5, 1)
    out = np.asarray(blocks_resnet.upsample_nearest(jnp.asarray(x), size))
    for i in range(size[0]):
        for j in range(size[1]):
            assert out[0, i, j, 0] == x[0, math.floor(i * 4 / size[0]), math.floor(j * 5 / size[1]), 0]


def test_doubling_is_upsampling_to_twice_the_size(key):
    x = draw(key, 2, 3, 5, 4)
    np.testing.assert_array_equal(blocks_resnet.upsample_nearest(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


def test_layouts_invert_each_other(key):
    kinds = {"conv": (130, 3, 3, 2), "linear": (70, 5), "embedding": (4, 6), "vector": ()}
    for i, (kind, shape) in enumerate(kinds.items()):
        array = np.asarray(draw(jax.random.fold_in(key, i), *shape))
        there = to_jax(kind, array)
        assert there.shape == jax_shape(ParamSpec(shape, kind))
        np.testing.assert_array_equal(to_torch(kind, there), array)
        assert not np.shares_memory(there, array)
        assert to_jax(kind, array, np.float16).dtype == np.float16
    weight = np.arange(5.0 * 3 * 2 * 4).reshape(5, 3, 2, 4)
    assert to_jax("conv", weight)[1, 3, 2, 4] == weight[4, 2, 1, 3]
    assert to_jax("linear", weight[0, 0])[3, 1] == weight[0, 0, 1, 3]


def test_old_names_of_attention_are_known():
    rename = blocks_resnet.modern_attention_key
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        assert rename(f"mid_block.attentions.0.{old}.weight") == f"mid_block.attentions.0.{new}.weight"
    for same in ("mid_block.attentions.0.to_q.bias", "conv_in.weight", "mid_block.resnets.0.key.weight"):
        assert rename(same) == same
