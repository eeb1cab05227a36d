"""Load pretrained weights of diffusers and transformers as JAX models: find the files, read and check them, convert.

Loading is strict: an unsupported configuration field, a missing, unexpected or misshapen tensor, and weights that are
not safetensors raise ``ValueError``, which names the culprit, before any parameter is allocated. Few tensors are
converted at a time, so that the peak of memory stays near the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.bridge.components import AUTOENCODERS, Components, plain_class, read_components
from scaling.bridge.refusals import no_weights
from scaling.bridge.sources import Source, join, locate
from scaling.bridge.weights import FLOATS, Tensor, read_header, read_index
from scaling.diffusion import schedules
from scaling.models.config import ParamSpec, to_jax
from scaling.models.model import ARCHITECTURES, DENOISERS, Apply, Model, from_config, parse_config
from sims.store.files import read_json

__all__ = ["Checkpoint", "Pipeline", "load_model", "load_pipeline", "read_checkpoints"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
# All that transformers reads for the ids of a text, on disk and from the hub.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# Tensors that are copied at a time; NumPy releases the GIL while it copies.
WORKERS = 2


class Pipeline(NamedTuple):
    """The components of a diffusers pipeline; those that it lacks are None or empty."""

    network: Model
    """The UNet or the transformer."""
    schedule: schedules.Schedule
    vae: Model | None
    text_encoders: tuple[Model, ...]
    tokenizers: tuple[Any, ...]
    """A ``transformers.CLIPTokenizer`` per text encoder."""
    settings: Mapping[str, Any]
    """Entries of model_index.json other than components, for example ``force_zeros_for_empty_prompt``."""


class Checkpoint(NamedTuple):
    """A network's files, checked against its configuration, with the weights not yet read."""

    place: str
    config: dict[str, Any]
    """The fields of config.json."""
    apply: Apply
    stored: dict[str, Tensor]
    """Each parameter's place in the files."""

    @property
    def dtypes(self) -> list[str]:
        """NumPy's names of the dtypes of the weights."""
        return sorted({np.dtype(FLOATS[tensor.dtype]).name for tensor in self.stored.values()})

    @property
    def num_parameters(self) -> int:
        """Number of parameters, counted as scalars."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    @property
    def num_bytes(self) -> int:
        """Size of the parameters on disk."""
        return sum(tensor.stop - tensor.start for tensor in self.stored.values())

    def taps(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every tap in order of computation, with its shape and dtype for one example of the configured size."""
        return self.apply.taps(jax.dtypes.canonicalize_dtype(self.dtypes[0]))


def load_model(
    path_or_hub_id: str | Path, subfolder: str | None = None, dtype: Any = None, revision: str | None = None
) -> Model:
    """Load one network.

    ``path_or_hub_id`` is a folder with config.json and weights (one safetensors file, or shards and their index), or
    the weights file in such a folder, or a name of :mod:`scaling.zoo`, or a repository on the Hugging Face hub; its
    ``revision`` is downloaded to huggingface_hub's cache, or read from there without a connection. ``dtype`` converts
    the parameters to float32, bfloat16, float16 or float64; None keeps the file's. If the folder holds the weights in
    two precisions, the float16 files are read if ``dtype`` is float16, else the others. Raises ``ValueError`` for
    anything that cannot be reproduced exactly.

    >>> import scaling
    >>> unet = scaling.load_model(scaling.zoo.folder("digits"), subfolder="unet", dtype="bfloat16")
    >>> unet.params["conv_in.weight"].shape, str(unet.params["conv_in.weight"].dtype)
    ((3, 3, 1, 32), 'bfloat16')
    """
    dtype = _checked_dtype(dtype)
    return _load(_checkpoint(locate(path_or_hub_id, revision), subfolder or "", dtype), dtype)


def load_pipeline(
    path_or_hub_id: str | Path,
    dtype: Any = None,
    revision: str | None = None,
    *,
    scheduler: str | Path | None = None,
    method: str | None = None,
) -> Pipeline:
    """Load the UNet or transformer, autoencoder, text encoders, tokenizers and scheduler that model_index.json lists.

    ``scheduler`` is a scheduler_config.json, or a folder with one, that replaces the pipeline's own; with it, a network
    without a pipeline loads as a pipeline of that network alone. ``method`` replaces the sampling method of the
    scheduler's class; without it, a scheduler whose steps are not supported is refused only by sampling. Safety
    checkers and feature extractors are not loaded. See :func:`load_model` for the other arguments.

    >>> import scaling
    >>> pipeline = scaling.load_pipeline(scaling.zoo.folder("captioned-digits"))
    >>> pipeline.network.apply.architecture, pipeline.schedule.method, len(pipeline.text_encoders)
    ('unet2d_condition', 'ddim', 1)
    """
    dtype = _checked_dtype(dtype)
    source = locate(path_or_hub_id, revision)
    origin = source.origin
    components = _components(source)
    folders = _folders(source, components)
    schedule = _schedule(source, components, scheduler, method)

    def load(part: str) -> Model:
        return _load(_checkpoint(source, folders[part], dtype, components.networks[part]), dtype)

    network = load(next(iter(folders)))
    if network.apply.architecture not in DENOISERS:
        raise ValueError(
            f"{origin}: a {network.apply.architecture} model removes no noise; give a UNet or a transformer."
        )
    autoencoder = next((part for part in AUTOENCODERS if part in folders), None)
    encoders = [part for part in folders if part.startswith("text_encoder")]
    return Pipeline(
        network=network,
        schedule=schedule,
        vae=load(autoencoder) if autoencoder else None,
        text_encoders=tuple(map(load, encoders)),
        tokenizers=tuple(_tokenizer(source, part.replace("text_encoder", "tokenizer")) for part in encoders),
        settings=components.settings,
    )


def read_checkpoints(path_or_hub_id: str | Path, revision: str | None = None) -> dict[str, Checkpoint]:
    """Checkpoints of a pipeline's networks by component, the UNet or transformer first; of a single network, ``model``.

    Checks everything that loading checks but reads no weights. See :func:`load_model` for the arguments.
    """
    source = locate(path_or_hub_id, revision)
    components = _components(source)
    return {
        part: _checkpoint(source, folder, None, components.networks[part])
        for part, folder in _folders(source, components).items()
    }


def _components(source: Source) -> Components:
    """The pipeline's components; without a model_index.json, the network at the root, whose class is not named."""
    path = source.fetch("model_index.json")
    return Components({"model": ""}, None, {}) if path is None else read_components(source.origin, read_json(path))


def _folders(source: Source, components: Components) -> dict[str, str]:
    """The folder of each network."""
    first, *others = components.networks
    # Early pipelines of one network have its files at the root.
    root = first == "model" or source.fetch(f"{first}/config.json") is None
    return {first: "" if root else first} | {part: part for part in others}


def _schedule(
    source: Source, components: Components, given: str | Path | None, method: str | None
) -> schedules.Schedule:
    if given is not None:
        path = Path(given)
        return schedules.read(read_json(path / "scheduler_config.json" if path.is_dir() else path), method)
    path = source.fetch("scheduler/scheduler_config.json") or source.fetch("scheduler_config.json")
    if path is None:
        raise ValueError(
            f"{source.origin}: no scheduler_config.json, so the meaning of its timesteps is unknown; give one with "
            "scheduler=."
        )
    config = read_json(path)
    # As in diffusers, the class that model_index.json names reads the scheduler's file, whatever class wrote it.
    if components.scheduler is not None:
        config["_class_name"] = components.scheduler
    return schedules.read(config, method)


def _checkpoint(source: Source, folder: str, dtype: np.dtype | None, named: str = "") -> Checkpoint:
    place = join(source.origin, folder)
    config_path = source.fetch(join(folder, "config.json"))
    if config_path is None:
        raise ValueError(f"{place}: no config.json here, nor in the cache; give subfolder= if the model is in one.")
    config = _of_class(place, read_json(config_path), named)
    apply = parse_config(config)
    stored = _by_parameter(apply, _stored(source, folder, config, dtype))
    _check(place, apply.parameters(), stored)
    return Checkpoint(place, config, apply, stored)


def _of_class(place: str, config: dict[str, Any], named: str) -> dict[str, Any]:
    """The configuration as the class reads it that model_index.json names, if it names one."""
    listed = config.get("architectures")
    own = config.get("_class_name") or (listed[0] if isinstance(listed, list) and len(listed) == 1 else None)
    if not named or own == named:
        return config
    known = ARCHITECTURES.get(plain_class(own)) if isinstance(own, str) else None
    if known not in (None, ARCHITECTURES[named]):
        raise ValueError(
            f"{place}: model_index.json says {named}, config.json says {own}; one of them belongs to other weights."
        )
    if named.startswith("CLIP"):
        return config | {"architectures": [named]}
    return config if own is not None else config | {"_class_name": named}


def _load(checkpoint: Checkpoint, dtype: np.dtype | None) -> Model:
    stored, specs = checkpoint.stored, checkpoint.apply.parameters()
    target = _target_dtype(checkpoint.place, stored, dtype)

    def converted(name: str) -> np.ndarray:
        # What overflows is refused just below.
        with np.errstate(over="ignore"):
            array = to_jax(specs[name].kind, stored[name].read(), target)
        if count := array.size - np.count_nonzero(np.isfinite(array)):
            overflow = np.all(np.isfinite(stored[name].read()))
            raise ValueError(
                f"{checkpoint.place}: {name} has {count} entries that are NaN or infinite"
                + (
                    f" as {target}; choose another dtype."
                    if overflow
                    else "; the file is damaged, or its training failed."
                )
            )
        return array

    # In the order of the files, so that each is read from front to back.
    order = sorted(stored, key=lambda name: (str(stored[name].path), stored[name].start))
    with ThreadPoolExecutor(WORKERS) as pool:
        arrays = zip(order, pool.map(converted, order), strict=True)
        params = {name: jax.device_put(array, may_alias=True) for name, array in arrays}
    return from_config(checkpoint.config, {name: params[name] for name in specs})


def _stored(source: Source, folder: str, config: Mapping[str, Any], dtype: np.dtype | None) -> dict[str, Tensor]:
    place, weights = join(source.origin, folder), source.weights
    if weights is None:
        stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        whole = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        half = (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")
        weights = half + whole if dtype == np.float16 else whole + half
    first = next((path for name in weights if (path := source.fetch(join(folder, name)))), None)
    if first is None:
        named = plain_class(config.get("_class_name") or config["architectures"][0])
        raise ValueError(no_weights(place, source.names(folder), weights, named))
    if first.suffix == ".safetensors":
        return read_header(first)
    stored: dict[str, Tensor] = {}
    for file, names in read_index(first).items():
        path = source.fetch(join(folder, file))
        if path is None:
            raise ValueError(f"{first}: its shard {file} is missing.")
        header = read_header(path)
        if set(header) != set(names):
            raise ValueError(f"{path}: its tensors and the index's differ in {_some(set(header) ^ set(names))}.")
        stored |= header
    return stored


def _by_parameter(apply: Apply, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rename = getattr(apply.module, "rename", lambda key: key)
    renamed: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = rename(key)
        if name in renamed:
            raise ValueError(f"{tensor.path}: {key!r} and another tensor both name the parameter {name!r}.")
        if name is not None:
            renamed[name] = tensor
    return renamed


def _check(place: str, specs: Mapping[str, ParamSpec], stored: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := set(specs) - set(stored):
        problems.append(f"missing: {_some(missing)}")
    if extra := set(stored) - set(specs):
        problems.append(f"unexpected: {_some(extra)}")
    both = set(specs) & set(stored)
    if shapes := {
        f"{name} {stored[name].shape}, not {specs[name].shape}"
        for name in both
        if stored[name].shape != specs[name].shape
    }:
        problems.append(f"misshapen: {_some(shapes)}")
    if kinds := {f"{name} {stored[name].dtype}" for name in both if stored[name].dtype not in FLOATS}:
        problems.append(f"not floating point: {_some(kinds)}")
    if problems:
        raise ValueError(f"{place}: the weights do not fit the configuration: {'; '.join(problems)}.")


def _target_dtype(place: str, stored: Mapping[str, Tensor], dtype: np.dtype | None) -> np.dtype:
    kinds = {tensor.dtype for tensor in stored.values()}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"{place}: the weights have dtypes {', '.join(sorted(kinds))}; choose one with dtype=.")
    target = dtype or _checked_dtype(FLOATS[kinds.pop()])
    assert target is not None
    return target


def _checked_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        checked = np.dtype(jnp.dtype(dtype))
    except TypeError:
        checked = None
    if checked is None or checked.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if checked.name == "float64" and jnp.result_type(float) != np.float64:
        raise ValueError("float64 parameters need JAX_ENABLE_X64=1; or choose dtype='float32'.")
    return checked


def _tokenizer(source: Source, folder: str) -> Any:
    from transformers import CLIPTokenizer

    files = {name: path for name in TOKENIZER_FILES if (path := source.fetch(f"{folder}/{name}"))}
    if not ({"vocab.json", "merges.txt"} <= files.keys() or "tokenizer.json" in files):
        raise ValueError(
            f"{join(source.origin, folder)}: no vocabulary of a CLIP tokenizer; it takes vocab.json and merges.txt, or "
            "tokenizer.json."
        )
    place = next(iter(files.values())).parent
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        # Some files are used only here.
        tokenizer("a photograph of a cat", padding="max_length", max_length=8, truncation=True)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # The tokenizer's readers raise anything, panics of its Rust code included.
    except BaseException as error:
        raise ValueError(
            f"{join(source.origin, folder)}: the tokenizer's files are damaged or do not fit each other "
            f"({type(error).__name__}: {str(error)[:200]}); copy the folder anew."
        ) from error
    if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 1:
        raise ValueError(
            f"{join(source.origin, folder)}: model_max_length is {tokenizer.model_max_length!r}, no length."
        )
    return tokenizer


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
