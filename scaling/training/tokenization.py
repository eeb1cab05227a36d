"""Tokenizers of the text encoders that are trained here: ``transformers.CLIPTokenizer`` with a small vocabulary.

Embeddings of CLIP's 49,408 tokens would be most of a small model. So the tokenizer keeps CLIP's alphabet (all 256
bytes, alone and at the end of a word), its splitting of text into words and its start and end tokens, and learns its
merges from the prompts by byte-pair encoding. Any text can be encoded; with enough ``merges`` every word of the prompts
is one token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from scaling.bridge.loading import TOKENIZER_FILES
from scaling.bridge.sources import locate
from sims.store.files import read_json, write_text

__all__ = ["copy_tokenizer", "encode", "fit_tokenizer"]

START, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP splits a text, see transformers.CLIPTokenizer.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SETTINGS = "tokenizer_config.json"
LONGEST = 77
"""Tokens that CLIP reads, including start and end."""


def fit_tokenizer(prompts: Sequence[str], folder: str | Path, *, merges: int = 512) -> Any:
    """Learn at most ``merges`` merges from the prompts, write a CLIP tokenizer into ``folder``, and load it.

    The same prompts in the same order give the same files.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        # As special tokens they have fixed numbers; otherwise numbers, and with them ties, would be random.
        special_tokens=alphabet,
    )
    learner.train_from_iterator(list(prompts), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in learned]
    words = dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs), START, END])
    folder = Path(folder)
    write_text(folder / "vocab.json", json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]))
    ends = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_text(folder / "special_tokens_map.json", json.dumps(ends, indent=2))
    write_text(folder / SETTINGS, json.dumps(ends | {"tokenizer_class": "CLIPTokenizer"}, indent=2))
    return _cut(folder, prompts)


def copy_tokenizer(source: str | Path, prompts: Sequence[str], folder: str | Path) -> Any:
    """Copy the CLIP tokenizer in the folder ``source``, and load it.

    ``ValueError`` if there is none, or if its files are links out of the folder.
    """
    # Links out of the folder are refused, as in a model's.
    fetch = locate(Path(source), None).fetch if Path(source).is_dir() else lambda _: None
    files = [file for name in TOKENIZER_FILES if (file := fetch(name)) is not None]
    if not files:
        raise ValueError(f"{source}: no vocab.json and merges.txt of a CLIP tokenizer.")
    folder = Path(folder)
    for file in files:
        write_text(folder / file.name, file.read_text(encoding="utf-8"))
    return _cut(folder, prompts)


def encode(tokenizer: Any, prompts: Sequence[str]) -> Int32[np.ndarray, "p t"]:
    """Token ids of the prompts, padded to the tokenizer's maximum length."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray(ids, np.int32)


def _cut(folder: Path, prompts: Sequence[str]) -> Any:
    """Set the maximum length to that of the longest prompt, rounded up to a multiple of 8, at most 77; and load."""
    longest = max(len(ids) for ids in _opened(folder)(list(prompts))["input_ids"])
    file = folder / SETTINGS
    settings = read_json(file) if file.exists() else {"tokenizer_class": "CLIPTokenizer"}
    write_text(file, json.dumps(settings | {"model_max_length": min(-8 * (-longest // 8), LONGEST)}, indent=2))
    return _opened(folder)


def _opened(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: no CLIP tokenizer: {error}.") from error
