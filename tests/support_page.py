"""Write scaling/SUPPORT.md from the code's own tables: what loads, what samples, and what is refused and why.

Run as ``python tests/support_page.py``; a test holds the page to what it writes.
"""

import pathlib

from scaling.bridge.components import COMPONENTS, IRRELEVANT, READ_BESIDE, SETTINGS, read_components
from scaling.bridge.loading import DTYPES, TOKENIZER_FILES
from scaling.bridge.refusals import PICKLES
from scaling.bridge.weights import FLOATS
from scaling.diffusion.choices import METHODS, OTHER_CLASSES
from scaling.diffusion.scheduler_fields import CHOICES, CLASSES, DEFAULTS
from scaling.diffusion.schedules import from_config
from scaling.models.config import NO_EFFECT, Fields
from scaling.models.model import ARCHITECTURES, parse_config
from sims.study.tables import markdown

PAGE = pathlib.Path(__file__).parents[1] / "scaling" / "SUPPORT.md"

BASES = {
    "Transformer2DModel": {"num_attention_heads": 2, "in_channels": 4, "num_layers": 1, "norm_type": "ada_norm_zero"}
    | {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "attention_bias": True},
}
"""Fields without which the class is not one that is supported."""

PIPELINES = {
    "CompVis/ldm-text2im-large-256": {"bert": ["ldm", "LDMBertModel"], "unet": ["d", "UNet2DConditionModel"]},
    "stable-diffusion-3": {"transformer": ["d", "SD3Transformer2DModel"]},
    "with a ControlNet": {"controlnet": ["d", "ControlNetModel"], "unet": ["d", "UNet2DConditionModel"]},
    "DeepFloyd IF": {"text_encoder": ["transformers", "T5EncoderModel"], "unet": ["d", "UNet2DConditionModel"]},
    "with a tiny autoencoder": {"vae": ["d", "AutoencoderTiny"], "unet": ["d", "UNet2DConditionModel"]},
    "Stable Cascade": {"prior": ["d", "StableCascadeUNet"]},
}
SCHEDULERS = (
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
    {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
    {"_class_name": "UniPCMultistepScheduler", "predict_x0": False},
)


class _Recorder(Fields):
    """Notes which values the getters allow."""

    seen: dict[str, dict[str, list]] = {}  # noqa: RUF012

    def _choice(self, name, value, choices):
        known = self.seen.setdefault(self.owner, {}).setdefault(name, [])
        known.extend(choice for choice in choices if choice not in known)
        return super()._choice(name, value, choices)


def limited():
    """By the class that reads them, the fields of which only some values are supported, with these values."""
    import importlib

    _Recorder.seen = {}
    modules = {importlib.import_module(f"scaling.models.{name}") for name in {*ARCHITECTURES.values()}}
    before = {module: module.Fields for module in modules}
    try:
        for module in modules:
            module.Fields = _Recorder
        for name in ARCHITECTURES:
            config = {"_class_name": name} if not name.startswith("CLIP") else {"architectures": [name]}
            try:
                parse_config(config | BASES.get(name, {}))
            except ValueError:
                # A default that is not supported: what was read before it is noted.
                continue
    finally:
        for module, fields in before.items():
            module.Fields = fields
    return _Recorder.seen


def refusal(call, *args):
    """The message of a refusal."""
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{args} is not refused")


def code(names):
    return ", ".join(f"`{name}`" for name in names)


def page():
    """The text of the page."""
    networks = [(f"`{name}`", f"`scaling.models.{module}`") for name, module in ARCHITECTURES.items()]
    fields = [
        (f"`{owner}`", f"`{name}`", code(map(repr, values)))
        for owner, of_owner in sorted(limited().items())
        for name, values in sorted(of_owner.items())
    ]
    inert = [(f"`{owner}`", code(sorted(names))) for owner, names in NO_EFFECT.items() if not owner.startswith("CLIP")]
    components = [
        (f"`{name}`", code(cls for cls, kind in ARCHITECTURES.items() if kind in kinds))
        for name, kinds in COMPONENTS.items()
    ]
    classes = [
        (f"`{cls}`", f"`{method}`", code(sorted(set(DEFAULTS[method]) & set(CHOICES))))
        for cls, method in CLASSES.items()
    ]
    values = [(f"`{name}`", code(map(repr, choices))) for name, choices in sorted(CHOICES.items())]
    pipelines = [(name, refusal(read_components, "MODEL", index)) for name, index in PIPELINES.items()]
    schedulers = [(code([config["_class_name"]]), refusal(from_config, config)) for config in SCHEDULERS]
    lines = [
        "# What loads, what samples, what is refused",
        "",
        "A file is read exactly or refused by name. This page is written by `tests/support_page.py` from the code's",
        "tables, and a test keeps the two equal. Differences from PyTorch's results are in [PARITY.md](PARITY.md).",
        "",
        "## Networks",
        "",
        "By the class that config.json or model_index.json names; classes of Flax (`Flax...`) are read as these.",
        "",
        markdown(("class", "module"), networks),
        "",
        "Networks of NVIDIA's EDM (SongUNet, DDPM++, ADM) are none of these: their checkpoints are pickles of code,",
        "which are not opened here. A network in JAX of your own goes through the same",
        "detectors and measures, as a denoiser or a noise prediction.",
        "",
        "Any other class is refused, and so is a field that is not known. Of these fields only some values are read:",
        "",
        markdown(("read by", "field", "values"), fields),
        "",
        "These fields have no effect on the result and may have any value, besides those that begin with `_`:",
        "",
        markdown(("class", "fields"), inert),
        "",
        "## Weights",
        "",
        f"Safetensors, whole or in shards with their index, of the types {code(FLOATS)}; they load as "
        f"{code(DTYPES)}. Files that end with {code(PICKLES)} are pickles, which can run any code when opened: they "
        "are never read, and the message has the command that converts them. Weights that are not finite are refused. "
        f"Tokenizers are read from {code(TOKENIZER_FILES)}.",
        "",
        "## Pipelines",
        "",
        "model_index.json lists a `unet` or a `transformer`, and may list:",
        "",
        markdown(("component", "classes"), components),
        "",
        f"Read beside them: {code(READ_BESIDE)}. Settings that are read: {code(SETTINGS)}. Without effect on the "
        f"images, and left out: {code(sorted(IRRELEVANT))}. All else is refused, unless it is null. For example:",
        "",
        markdown(("pipeline", "message"), pipelines),
        "",
        "## Schedulers",
        "",
        "The steps of these classes are reproduced; the last column has their fields of which only some values are.",
        "",
        markdown(("class", "`--sampler`", "limited fields"), classes),
        "",
        markdown(("field", "values"), values),
        "",
        f"Of {code(OTHER_CLASSES)} the noise schedule is read, which is all that `inspect`, `extract` and `jacobian` "
        f"need; to sample, choose another method: {code(METHODS)}. Other classes and values are refused:",
        "",
        markdown(("class", "message"), schedulers),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
