"""The second look: another order where the reranker gives one, the same where it fails; every known wire."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from retrieval import EmbedderMissing, Library, RetrievalSettings
from retrieval.reranking import CrossEncoderReranker, HttpReranker
from tests.retrieval.making import tiny_cross_encoder


class Longest:
    """The longest text is the best; asked for counts what it was asked."""

    def __init__(self, fails: bool = False):
        self.asked: list[list[str]] = []
        self.fails = fails
        self.closed = False

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        self.asked.append(list(texts))
        if self.fails:
            raise TimeoutError("too slow")
        return [float(len(text)) for text in texts]

    def close(self) -> None:
        self.closed = True


PAGES = [
    ("a", "A", "Trains are red.", "text/plain"),
    ("b", "B", "Trains are red, and they are late on most of the days of the week.", "text/plain"),
    ("c", "C", "Trains are late.", "text/plain"),
]


def test_the_reranker_decides_the_order(open_library: Callable[..., Library]):
    reranker = Longest()
    library = open_library(reranker=reranker)
    library.ingest_documents(PAGES)
    found = library.whole.search("trains are red", top_k=3)
    assert [passage.title for passage in found.passages] == ["B", "C", "A"]
    assert all(0 <= passage.score <= 1 for passage in found.passages)
    assert "rerank" in found.timings
    assert len(reranker.asked[0]) == 3
    library.close()
    assert reranker.closed


def test_only_the_best_candidates_are_looked_at(open_library: Callable[..., Library]):
    reranker = Longest()
    library = open_library(reranker=reranker, settings=RetrievalSettings(rerank_candidates=2, relevance_floor=0))
    library.ingest_documents([(f"{n}", f"T{n}", f"Trains number {n}.", "text/plain") for n in range(9)])
    assert len(library.whole.search("trains", top_k=1).passages) == 1
    assert [len(texts) for texts in reranker.asked] == [2]


def test_where_it_fails_the_order_stays(open_library: Callable[..., Library], caplog: pytest.LogCaptureFixture):
    library = open_library()
    library.ingest_documents(PAGES)
    expected = library.whole.search("trains are red", top_k=3).passages
    library.close()
    library = open_library(reranker=Longest(fails=True))
    assert library.whole.search("trains are red", top_k=3).passages == expected
    assert "TimeoutError: too slow" in caplog.text


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Answers as `server.kind` does: cohere, tei, or wrong; `server.got` has the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.got.append((body, self.headers.get("Authorization")))
            status, answer = 200, None
            if self.server.kind == "tei" and "texts" not in body:
                status, answer = 422, {"error": "missing field `texts`"}
            elif self.server.kind == "tei":
                answer = [{"index": i, "score": len(t)} for i, t in enumerate(body["texts"])][::-1]
            elif self.server.kind == "cohere":
                answer = {"results": [{"index": i, "relevance_score": 0.1 * i} for i in range(len(body["documents"]))]}
            else:
                answer = {"results": [{"index": 99, "relevance_score": 1.0}]}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.kind = [], "cohere"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["cohere", "tei"])
def test_servers_of_both_kinds(server: HTTPServer, kind: str):
    server.kind = kind
    reranker = HttpReranker(f"http://127.0.0.1:{server.server_port}/rerank", "bge", key="secret")
    for _ in range(2):
        assert reranker.scores("q", ["a", "bbb"]) == ([0.0, 0.1] if kind == "cohere" else [1.0, 3.0])
    reranker.close()
    bodies = [body for body, _ in server.got]
    assert len(bodies) == (2 if kind == "cohere" else 3), "what it wants is found out once"
    expected = {"query": "q", "documents": ["a", "bbb"], "model": "bge"}
    assert bodies[0] == expected
    assert bodies[-1] == (expected if kind == "cohere" else {"query": "q", "texts": ["a", "bbb"]})
    assert {key for _, key in server.got} == {"Bearer secret"}


def test_a_server_that_answers_nonsense_changes_nothing(server: HTTPServer, open_library: Callable[..., Library]):
    server.kind = "wrong"
    url = f"http://127.0.0.1:{server.server_port}/rerank"
    library = open_library(settings=RetrievalSettings(reranker=url, relevance_floor=0))
    library.ingest_documents(PAGES)
    assert library.whole.search("trains are red", top_k=3).passages[0].title == "A"
    assert server.got


def test_a_missing_model_is_named(open_library: Callable[..., Library]):
    with pytest.raises(EmbedderMissing, match="reranking model at ./nowhere"):
        open_library(settings=RetrievalSettings(reranker="./nowhere"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrossEncoderReranker]:
    """Loaded here, since the libraries below it keep threads of their own from then on."""
    reranker = CrossEncoderReranker(str(tiny_cross_encoder(tmp_path_factory.mktemp("models") / "model")), threads=1)
    reranker.scores("load", ["it"])
    yield reranker
    reranker.close()


@pytest.mark.slow
def test_a_cross_encoder_in_a_folder(cross_encoder: CrossEncoderReranker):
    scores = cross_encoder.scores("trains", ["trains are late", "a dog"])
    assert len(set(scores)) == 2
    assert cross_encoder.scores("trains", ["trains are late", "a dog"]) == scores
