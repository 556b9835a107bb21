import os

import numpy as np
import pytest

from hf_crouter.data import parallel
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import TokenArray, encode_documents
from hf_crouter.errors import InputError

from .samples import byte_tokenizer, library_documents


@pytest.fixture(scope="module")
def documents():
    return [*library_documents(), Document("short", "other", "abc"), Document("special", "other", "<|endoftext|> x")]


@pytest.fixture(scope="module")
def tokens(documents):
    return encode_documents(documents, byte_tokenizer(), separator_id=0)


def test_every_document_comes_back_and_only_separators_are_zero(documents, tokens):
    tokenizer = byte_tokenizer()
    assert tokens.ids.dtype == np.uint16
    found = list(tokens.documents())
    assert [(name, group) for name, group, _ in found] == [(d.id, d.group) for d in documents]
    assert all(tokenizer.decode(ids) == d.text for d, (_, _, ids) in zip(documents, found, strict=True))
    assert np.flatnonzero(tokens.ids == 0).tolist() == (tokens.starts[1:] - 1).tolist()


def test_the_given_tokenizer_is_left_alone(documents):
    tokenizer = byte_tokenizer()
    encode_documents(documents[:1], tokenizer, separator_id=0)
    assert tokenizer.encode("<|endoftext|>") == [0]


def test_processes_change_nothing(documents, tokens, monkeypatch):
    monkeypatch.setattr(parallel, "_FLOOR", 0)
    monkeypatch.setattr(parallel, "_BATCH", 50_000)
    again = encode_documents(documents, byte_tokenizer(), separator_id=0, workers=2)
    assert (again.ids == tokens.ids).all() and (again.starts == tokens.starts).all()


def test_windows_are_counted_not_remembered(tokens):
    windows = tokens.windows(128, seed=3, index=7, batch=4)
    assert windows.shape == (4, 128) and windows.dtype == np.int64
    assert (windows == tokens.windows(128, seed=3, index=7, batch=4)).all()
    assert (windows != tokens.windows(128, seed=3, index=8, batch=4)).any()
    assert (windows != tokens.windows(128, seed=4, index=7, batch=4)).any()
    flat = tokens.ids.astype(np.int64)
    views = np.lib.stride_tricks.sliding_window_view(flat, 128)
    assert all((views == row).all(axis=1).any() for row in windows)
    assert (tokens.windows(len(tokens), 0, 0, 2) == flat).all()
    with pytest.raises(InputError, match="need a longer text"):
        tokens.windows(len(tokens) + 1, 0, 0, 1)


def test_chunks_cover_every_document_once(tokens):
    ids, mask = tokens.chunks(100)
    expected = [piece for _, _, d in tokens.documents() for piece in np.split(d, range(100, len(d), 100))]
    assert len(ids) == len(expected) == len(mask)
    assert all((row[held] == piece).all() and held.sum() == len(piece)
               for row, held, piece in zip(ids, mask, expected, strict=True))  # fmt: skip
    assert (ids[~mask] == 0).all() and mask[:, 0].all()
    some, _ = tokens.chunks(100, limit=10)
    assert some.shape == (10, 100) and (some == ids[np.arange(10) * len(ids) // 10]).all()
    assert tokens.chunks(100, limit=10**6)[0].shape == ids.shape


def test_document_windows_stay_inside_one_document_each(tokens):
    windows, which = tokens.document_windows(256, seed=1)
    found = list(tokens.documents())
    assert sorted(which) == [i for i, (_, _, ids) in enumerate(found) if len(ids) >= 256]
    for row, index in zip(windows, which, strict=True):
        ids = found[index][2].astype(np.int64)
        assert (np.lib.stride_tricks.sliding_window_view(ids, 256) == row).all(axis=1).any()
    fewer, some = tokens.document_windows(256, seed=1, limit=3)
    assert (fewer == windows[:3]).all() and (some == which[:3]).all()
    assert tokens.document_windows(10**7)[0].shape == (0, 10**7)


def test_saved_and_loaded(tokens, tmp_path):
    path = tmp_path / "t.safetensors"
    tokens.save(path)
    loaded = TokenArray.load(path)
    assert (loaded.ids == tokens.ids).all() and loaded.ids.dtype == tokens.ids.dtype
    assert (loaded.starts == tokens.starts).all()
    assert (loaded.names, loaded.groups, loaded.separator_id, loaded.vocab_size) == (
        tokens.names, tokens.groups, tokens.separator_id, tokens.vocab_size,
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_nothing_at_all_is_saved_and_loaded_too(tmp_path):
    empty = encode_documents([], byte_tokenizer(), separator_id=0)
    empty.save(tmp_path / "e.safetensors")
    assert len(TokenArray.load(tmp_path / "e.safetensors")) == 0
    assert empty.chunks(8)[0].shape == (0, 8) and list(empty.documents()) == []


def test_damaged_files_are_refused(tokens, tmp_path):
    path = tmp_path / "t.safetensors"
    tokens.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"):
        TokenArray.load(path)
    path.write_bytes(data[:-1] + b"\xff")
    with pytest.raises(InputError, match="damaged"):
        TokenArray.load(path)
    with pytest.raises(InputError, match="no such token file"):
        TokenArray.load(tmp_path / "absent.safetensors")


def test_a_failed_write_leaves_nothing(tokens, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "t.safetensors").write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="disk is full"):
        tokens.save(tmp_path / "t.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert (tmp_path / "t.safetensors").read_text() == "before"


def test_bad_tokenizers_are_refused(documents):
    with pytest.raises(InputError, match="fast tokenizer"):
        encode_documents(documents, object(), separator_id=0)
    with pytest.raises(InputError, match="separator"):
        encode_documents(documents, byte_tokenizer(), separator_id=999)
