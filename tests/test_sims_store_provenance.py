"""Provenance: what changed between the sessions of one run."""

import types

import jax
import pytest

from sims.store.provenance import differences, environment


def test_equal_sessions_differ_in_nothing_and_changes_are_named_in_order():
    here = environment()
    assert differences([]) == differences([here]) == differences([here, here]) == {}
    there = here | {"host": "other", "versions": here["versions"] | {"jax": "0.0.1"}}
    assert differences([here, there, here]) == {
        "host": [here["host"], "other"],
        "jax": [here["versions"]["jax"], "0.0.1"],
    }
    wider = here | {"device": here["device"] | {"count": 64}}
    assert differences([wider, here]) == {"device count": ["64", str(here["device"]["count"])]}
    # A record made anew knows nothing of its sessions.
    assert differences([{}, {}]) == {}


@pytest.mark.parametrize(("chosen", "said"), [(None, "default"), ("highest", "highest")])
def test_accelerators_say_how_precisely_they_multiply(monkeypatch, chosen, said):
    """A CPU's products are the same at every precision."""
    assert "precision" not in environment()["device"]
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="one")])
    with jax.default_matmul_precision(chosen):
        assert environment()["device"]["precision"] == said
