"""Write the golden files: what PyTorch's diffusers and transformers compute on the cases. Needs the extra ``parity``.

python tests/golden/make.py [CASE ...]
"""

from __future__ import annotations

import argparse
import importlib
import inspect

import diffusers
import numpy as np
import torch
import transformers
from cases import CASES, parameter
from safetensors.numpy import save

from scaling.models.model import parse_config

ARGUMENTS = {
    "x": "sample",
    "t": "timestep",
    "context": "encoder_hidden_states",
    "added": "added_cond_kwargs",
    "class_labels": "class_labels",
}


def build(config):
    """The PyTorch module of a configuration, with the cases' weights, which go by our names."""
    if "_class_name" in config:
        former = {"Transformer2DModel": "DiTTransformer2DModel"}
        kind = getattr(diffusers, former.get(config["_class_name"], config["_class_name"]))
        known = config.keys() & inspect.signature(kind.__init__).parameters.keys()
        module = kind.from_config({name: config[name] for name in known})
    else:
        kind = getattr(transformers, config["architectures"][0])
        module = kind(kind.config_class(**config))
    rename = getattr(parse_config(config).module, "rename", lambda key: key)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.from_numpy(parameter(rename(name), tuple(tensor.shape))))
    return module.eval()


def call(module, inputs):
    """The module's outputs, in the order of ours."""
    match type(module).__name__:
        case "AutoencoderKL":
            posterior = module.encode(inputs["images"]).latent_dist
            return module.decode(posterior.mode()).sample, posterior.mean, posterior.logvar
        case "CLIPTextModel" | "CLIPTextModelWithProjection":
            out = module(inputs["ids"], output_hidden_states=True)
            return out.last_hidden_state, out.hidden_states[-2], out[0] if "text_embeds" in out else out.pooler_output
        case "CLIPVisionModelWithProjection":
            out = module(inputs["images"])
            return out.last_hidden_state, out.image_embeds
        case "DiTTransformer2DModel":
            return module(inputs["x"], inputs["t"], inputs["class_labels"], return_dict=False)
    return module(**{ARGUMENTS[name]: value for name, value in inputs.items()}, return_dict=False)


def submodule(module, name):
    """The module of a tap: transformers 5 leaves out our prefix where there is nothing beside it."""
    return module.get_submodule(name if hasattr(module, name.split(".")[0]) else name.split(".", 1)[1])


def compute(case):
    """Outputs (``out.0``, ``out.1``, ...) and taps (``tap.NAME``) by PyTorch, in float32."""
    module, seen = build(case.config), {}
    for name in case.taps:
        submodule(module, name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.update(
                {name: output[0] if type(output) is tuple else output}
            )
        )
    with torch.no_grad():
        outputs = call(module, _tensors(case.inputs))
    outputs = {f"out.{i}": output for i, output in enumerate(outputs)}
    arrays = outputs | {f"tap.{name}": value for name, value in seen.items()}
    return {name: np.ascontiguousarray(value.numpy()) for name, value in arrays.items()}


def _tensors(value):
    if isinstance(value, dict):
        return {name: _tensors(item) for name, item in value.items()}
    return torch.from_numpy(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all by default")
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "diffusers", "transformers")}
    for name in parser.parse_args().cases or CASES:
        CASES[name].path(name).write_bytes(save(compute(CASES[name]), versions))


if __name__ == "__main__":
    main()
