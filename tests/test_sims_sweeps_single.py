"""Single runs: weights and course on disk, exact resume, refusals."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dae_theory import AffineDae
from sims.sweeps import single
from sims.sweeps.spec import Spec

SPEC = Spec(
    num_samples=5,
    width=4,
    sigma=0.4,
    seeds=1,
    steps=9,
    record_steps=(0, 3, 9),
    batch_size=2,
    eval_samples=5,
    eval_draws=2,
)
NAMES = ("train_error", "num_live_columns")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    return out, single.run(SPEC, NAMES, out)


def test_the_course_and_the_weights_are_written(finished):
    out, course = finished
    assert [row["step"] for row in course] == [0, 3, 9]
    assert json.loads((out / "course.json").read_text()) == course
    dae = single.load_dae(out / "weights.safetensors")
    assert dae.w1.shape == dae.w2.shape == (64, 4)
    assert np.all(np.isfinite(dae.w1))


def test_a_network_with_biases_is_written_with_them(tmp_path):
    spec = Spec.from_dict(SPEC.to_dict() | {"biases": True, "steps": 2, "record_steps": [2]})
    single.run(spec, ("train_error",), tmp_path / "run")
    dae = single.load_dae(tmp_path / "run" / "weights.safetensors")
    assert isinstance(dae, AffineDae)
    assert (dae.b1.shape, dae.b2.shape) == ((4,), (64,))
    assert np.any(dae.b2)
    assert "biases" not in SPEC.to_dict()
    assert spec.to_dict()["biases"] == [True]


def test_the_same_call_again_returns_at_once(finished):
    out, course = finished
    records = []
    assert single.run(SPEC, NAMES, out, on_record=lambda *a: records.append(a)) == course
    assert records == []


def test_a_cut_run_resumes_bit_for_bit(finished, tmp_path):
    out, course = finished

    def stop(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        single.run(SPEC, NAMES, tmp_path / "run", on_record=stop)
    assert single.run(SPEC, NAMES, tmp_path / "run") == course
    for name in ("weights.safetensors", "state.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()


def test_axes_of_several_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs one sigma"):
        single.run(Spec(num_samples=5, sigma=(0.1, 0.2)), NAMES, tmp_path)


def test_another_run_and_other_folders_are_refused(finished, tmp_path):
    out, _ = finished
    with pytest.raises(ValueError, match=r"batch_size is \[2\] there, \[0\] here"):
        single.run(Spec.from_dict(SPEC.to_dict() | {"batch_size": 0}), NAMES, out)
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(ValueError, match="something other than a single run"):
        single.run(SPEC, NAMES, tmp_path)
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        single.run(SPEC, NAMES, tmp_path)


def test_damaged_files_are_named(finished, tmp_path):
    out, _ = finished
    (tmp_path / "spec.json").write_bytes((out / "spec.json").read_bytes())
    (tmp_path / "state.safetensors").write_bytes((out / "state.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"state.safetensors is damaged.*move it away"):
        single.run(SPEC, NAMES, tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        single.load_dae(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="should hold w1 and w2"):
        single.load_dae(out / "state.safetensors")


def test_a_flipped_bit_and_the_state_of_another_run_are_noticed(finished, tmp_path):
    out, course = finished
    for name in ("spec.json", "state.safetensors"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    content = bytearray((out / "state.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        single.run(SPEC, NAMES, tmp_path)
    # A spec that was edited, or exchanged, beside the state of the run.
    (tmp_path / "state.safetensors").write_bytes((out / "state.safetensors").read_bytes())
    record = json.loads((out / "spec.json").read_text())
    record["single"]["penalty"] = [0.5]
    (tmp_path / "spec.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"state\.safetensors is the state of another run"):
        single.run(Spec.from_dict(SPEC.to_dict() | {"penalty": 0.5}), NAMES, tmp_path)
    # Checkpoints of earlier versions have neither checksum nor name.
    with safetensors.safe_open(out / "state.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        older = {"course": json.dumps(json.loads(file.metadata()["course"])["rows"])}
    safetensors.numpy.save_file(tensors, tmp_path / "state.safetensors", older)
    (tmp_path / "spec.json").write_bytes((out / "spec.json").read_bytes())
    assert single.run(SPEC, NAMES, tmp_path) == course
