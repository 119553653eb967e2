"""Vectors on a GPU, here on the device that torch calls "cpu"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval import Library, RetrievalSettings, StoreError
from retrieval.sqlite.device_vectors import DeviceVectors


def test_what_may_be_seen_is_found_and_nothing_else():
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((900, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.arange(900) * 3 + 1
    index = DeviceVectors(48, "cpu")
    assert index.search(vectors[0], 5) == []
    for start in range(0, 900, 7):
        index.add(ids[start : start + 7], vectors[start : start + 7])
    among = ids[::10]
    for query in vectors[:50]:
        assert index.search(query, 5)[0] == ids[np.argmax(vectors @ query)]
        exact = among[np.argsort(-(vectors[::10] @ query))[:10]]
        assert set(exact) <= set(index.search(query, 20, among)) <= set(among)
    index.remove(among[:20])
    assert not {*among[:20]} & {*index.search(vectors[0], 900)}
    assert sorted(index.numbers()) == sorted({*ids} - {*among[:20]})
    assert len(index.search(vectors[0], 900, np.array([*among[:20], among[21]]))) == 1


def test_a_library_with_its_vectors_there(
    open_library: Callable[..., Library], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def on_the_cpu(make: Callable, *arguments, device: str, **options):
        assert device == "cuda"
        return make(*arguments, device="cpu", **options)

    monkeypatch.setattr("retrieval.sqlite.device_vectors.torch.empty", partial(on_the_cpu, torch.empty))
    for _ in range(2):
        library = open_library(settings=RetrievalSettings(relevance_floor=0, vectors_on="cuda"))
        library.ingest_paths([folder])
        assert isinstance(library._indexes.vectors, DeviceVectors)
        assert library.whole.search("how many days of leave").passages[0].title == "Leave"
        library.close()


def test_a_device_that_is_not_there_is_named(open_library: Callable[..., Library]):
    with pytest.raises(StoreError, match=r"on 'cuda:7'.*vectors_on") as refused:
        open_library(settings=RetrievalSettings(vectors_on="cuda:7"))
    assert refused.value.code == "bad_device"
