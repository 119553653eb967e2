"""The counting of shared documents, on a short trace."""

from __future__ import annotations

import pytest

from loadtests import rag, sharing


@pytest.mark.parametrize("trace", [trace for trace in sharing.TRACES if trace != "retrieved"])
def test_every_order_of_a_short_trace(trace: str):
    counted = {arm: sharing.run(trace, arm, 3000, 60, seed=0) for arm in sharing.ARMS}
    plain, planned = counted["as ranked, LRU"], counted["planned"]
    assert plain.changed == plain.displaced == 0
    assert plain.reused <= planned.reused <= 1
    assert (planned.displaced > 0) == (planned.changed > 0)
    assert counted["planned, without end"].reused >= planned.reused
    assert all(arm.approximate == 0 for name, arm in counted.items() if "segments" not in name)
    again = sharing.run(trace, "planned", 3000, 60, seed=0)
    assert again[:3] == planned[:3]


def test_the_greedy_tree_goes_on_with_what_it_knows():
    greedy = sharing.Greedy()
    assert [greedy(ranked) for ranked in ([1, 2, 3], [2, 1, 4], [3, 2, 1], [4, 2])] == [
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 3],
        [4, 2],
    ]


def test_the_load_client_sends_the_same_prompt_in_documents():
    (request,) = rag.workload(rag.corpus(), 1)
    body = request.in_documents("planned")
    texts = [document["text"] for document in body["documents"]]
    assert "\n\n".join([*texts, body["messages"][1]["content"]]) == request.messages[1]["content"]
    assert body["document_order"] == "planned"
