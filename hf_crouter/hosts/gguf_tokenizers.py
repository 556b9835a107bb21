"""The tokenizer in a GGUF file, as a fast tokenizer of transformers.

Stated here in full, so that token ids and a tokenizer's fingerprint do not depend on how a version of transformers
reads GGUF files. Normaliser and pre-tokenizer are those of the family's original tokenizer, which a file only names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ..errors import InputError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # kinds of tokens in GGUF files
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Files call every token that looks like <|...|> or <unused1> a control token; in the original tokenizers these are
# ordinary added tokens, which stay in decoded text.
_QWEN2_ORDINARY = re.compile(r"<\|(fim_\w+|repo_name|file_sep)\|>")
_GEMMA_SPECIAL = re.compile(r"<(pad|eos|bos|unk|start_of_turn|end_of_turn|start_of_image|end_of_image)>")
_SPACE = "\u2581"


def gguf_tokenizer(settings: Mapping[str, Any], *, splits_digits: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Args:
        settings: the file's, by their full names.
        splits_digits: of Llama-type models, whether every digit is taken alone.

    Raises:
        InputError: if the architecture's tokenizer is of another kind than its family's, or its ids have holes.
        KeyError: if a setting is missing.
    """
    architecture = settings["general.architecture"]
    kind = (settings["tokenizer.ggml.model"], settings.get("tokenizer.ggml.pre", ""))
    expected, make = _MAKERS[architecture]
    if kind not in expected:
        known = " or ".join("/".join(entry) for entry in expected)
        raise InputError(f"tokenizer of a {architecture} file: expected {known}, got {'/'.join(kind)}")
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    backend = make(settings, splits_digits)
    options = _special_tokens(settings)
    if architecture == "qwen2":
        options.pop("bos_token", None)  # the original has none; files repeat the configuration's
    if architecture == "gemma3":
        options |= {"padding_side": "left", "mask_token": "<mask>" if "<mask>" in tokens[:8] else None}
    added = {
        number: AddedToken(text, normalized=False, special=_is_special(architecture, text, kind))
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
        for text in [_respelled(token) if architecture == "gemma3" else token]
    }
    backend.add_tokens(list(added.values()))  # at once: one by one takes time that grows with their square
    for number, token in added.items():
        if backend.token_to_id(token.content) != number:
            got = backend.token_to_id(token.content)
            raise InputError(f"token {token.content!r}: expected id {number}, got {got}")
    template = settings.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **options)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    tokens = settings["tokenizer.ggml.tokens"]
    ids = {name: settings.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    return {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}


def _is_special(architecture: str, token: str, kind: int) -> bool:
    if architecture == "gemma3":
        return bool(_GEMMA_SPECIAL.fullmatch(token))
    return kind == CONTROL and not (architecture == "qwen2" and _QWEN2_ORDINARY.fullmatch(token))


def _byte_level(settings: Mapping[str, Any], vocab: dict[str, int]) -> Tokenizer:
    merges = [tuple(pair.split(" ")) for pair in settings["tokenizer.ggml.merges"]]
    plain = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False, **plain))
    backend.decoder = decoders.ByteLevel()
    return backend


def _llama(settings: Mapping[str, Any], splits_digits: bool) -> Tokenizer:
    backend = _byte_level(settings, {t: n for n, t in enumerate(settings["tokenizer.ggml.tokens"])})
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splits_digits:
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pieces])
    backend.pre_tokenizer = pieces
    return backend


def _qwen2(settings: Mapping[str, Any], splits_digits: bool) -> Tokenizer:
    # The original's vocabulary ends before its added tokens, and the file's padding to a round number is none of it.
    pairs = zip(settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"], strict=True)
    backend = _byte_level(settings, {t: n for n, (t, kind) in enumerate(pairs) if kind == NORMAL})
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    return backend


def _gemma(settings: Mapping[str, Any], splits_digits: bool) -> Tokenizer:
    vocab = {_respelled(token): number for number, token in enumerate(settings["tokenizer.ggml.tokens"])}
    unknown = settings["tokenizer.ggml.tokens"][settings["tokenizer.ggml.unknown_token_id"]]
    backend = Tokenizer(
        BPE(vocab=vocab, merges=merges_of(vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if settings.get("tokenizer.ggml.add_bos_token", True):
        number = settings["tokenizer.ggml.bos_token_id"]
        token = settings["tokenizer.ggml.tokens"][number]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, number)]
        )
    return backend


def _respelled(token: str) -> str:
    """Runs of spaces stand in the file as such; the vocabulary spells a space as everywhere else."""
    return token.replace(" ", _SPACE) if not token.strip(" ") else token


def merges_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every way to cut a token into two, earlier tokens first.

    Gemma's pieces are numbered by falling score, so that an id is a rank.

    Args:
        vocab: ids of tokens.
    """
    ranked = []
    for token, number in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((number, -len(left), left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]


_MAKERS = {
    "llama": ((("gpt2", "smollm"),), _llama),
    "qwen2": ((("gpt2", "qwen2"),), _qwen2),
    "gemma3": ((("llama", "default"), ("llama", "")), _gemma),
}
