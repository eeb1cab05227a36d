"""The real size against diffusers: Stable Diffusion 1.4's UNet, made and saved by PyTorch, loaded and run by us."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from test_scaling_models_full_size import PUBLISHED, check_measures, inputs, measured, room  # noqa: E402, F401
from torch_side import TOLERANCE, difference  # noqa: E402

from scaling.bench.unet import DETECTOR_TAP  # noqa: E402


@pytest.mark.slow
def test_output_and_detector_tap_equal(room):  # noqa: F811
    torch.manual_seed(0)
    module = diffusers.UNet2DConditionModel.from_config({k: v for k, v in PUBLISHED.items() if k[0] != "_"}).eval()
    module.save_pretrained(room / "unet")
    calls, seen = inputs(1), []
    module.get_submodule(DETECTOR_TAP).register_forward_hook(lambda _module, _args, out: seen.append(out.numpy()))
    with torch.no_grad():
        x, t, context = (torch.from_numpy(np.asarray(calls[name][0])) for name in ("x", "t", "context"))
        out = module(x, t, context).sample
    results = measured(room / "unet", calls, room)
    check_measures(results)
    assert difference(results["out"][0], out) <= TOLERANCE["float32"]
    assert difference(results["tap"][0], seen[-1]) <= TOLERANCE["float32"]
