"""From a passage to those before and behind it."""

from __future__ import annotations

import pytest

from retrieval import Library, Principal, UnknownPassage


@pytest.mark.every_place
def test_the_passages_around_one(library: Library):
    for name in ("a.txt", "b.txt"):
        text = " ".join(f"Pump {number} in {name} is old and loud." for number in range(200))
        library.ingest_bytes(name, text.encode(), readers=["group:hr"])
    ada = library.seen_by(Principal.of("ada", ["hr"]))
    source = library.whole.documents()[0][0].source
    found = ada.search("old and loud pumps", top_k=50).passages
    passages = sorted((each for each in found if each.source == source), key=lambda each: each.start)
    assert len(passages) >= 6
    ids = [each.passage_id for each in passages]
    for at, here in enumerate(ids):
        for before, after in ((0, 0), (1, 1), (2, 0), (0, 2), (50, 50), (-1, -1)):
            around = ada.around(here, before, after)
            assert [each.passage_id for each in around] == ids[max(0, at - max(0, before)) : at + max(0, after) + 1]
    assert ada.around(ids[0])[1].text == passages[1].text


@pytest.mark.every_place
def test_who_may_not_read_a_passage_reads_none_around_it(library: Library):
    document = library.ingest_bytes("a.txt", b"The wages rise. " * 200, readers=["group:hr"])
    (first, *_) = library.whole.search("wages", top_k=1).passages
    assert library.whole.around(first.passage_id)
    ada, bob = library.seen_by(Principal.of("ada", ["hr"])), library.seen_by(Principal.of("bob"))
    for view, passage_id in ((bob, first.passage_id), (ada, "p999"), (ada, "no id")):
        with pytest.raises(UnknownPassage):
            view.around(passage_id)
    library.whole.remove(document.document_id)
    with pytest.raises(UnknownPassage):
        library.whole.around(first.passage_id)
