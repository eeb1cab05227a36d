"""Options of the compiler and of linear algebra."""

import jax
import jax.numpy as jnp
import threadpoolctl

from scaling import backend
from scaling.backend import compiler_options, cpu_aware, limit_blas_threads


def test_the_cpu_gets_its_own_routines_and_other_devices_the_plain_ones(monkeypatch):
    assert cpu_aware()
    for name in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        assert not cpu_aware()
        # Unless the user computes on the CPU beside it.
        with jax.default_device(jax.devices("cpu")[0]):
            assert cpu_aware()


def test_lapack_of_jax_takes_one_thread():
    jnp.linalg.qr(jnp.eye(3))
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        assert any(pool["num_threads"] > 1 for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
        limit_blas_threads()
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    assert pools
    assert {pool["num_threads"] for pool in pools} == {1}


def test_the_options_compile_and_change_nothing(monkeypatch):
    def convolve(x):
        return jax.lax.conv(x, x, (1, 1), "SAME")

    x = jnp.arange(16.0).reshape(1, 1, 4, 4)
    compiled = jax.jit(convolve, compiler_options=compiler_options()).lower(x).compile()
    assert jnp.allclose(compiled(x), convolve(x), rtol=1e-12)
    monkeypatch.setattr(backend, "cpu_aware", lambda: False)
    assert compiler_options() == {}
