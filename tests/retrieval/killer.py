"""Adds documents to the library in argv[1], from number argv[2] on, and says of each when it is safe, where argv[3] is
"hasty" before it is; removes each tenth again."""

import sys
from pathlib import Path

from retrieval import Library, RetrievalSettings
from retrieval.formats import reading
from tests.retrieval.hashing import HashingEmbedder

library = Library.open(
    Path(sys.argv[1]), embedder=HashingEmbedder(), settings=RetrievalSettings(relevance_floor=0.2), reader=reading
)
print("open", flush=True)
for number in range(int(sys.argv[2]), 10**9):
    text = f"# Gate {number}\n\nThe gate number{number}x is opened by the keeper of key{number}x."
    if sys.argv[3] == "hasty":
        print(f"added {number}", flush=True)
    document = library.ingest_bytes(f"{number}.md", text.encode(), readers=[f"group:g{number % 3}"])
    if sys.argv[3] != "hasty":
        print(f"added {number}", flush=True)
    if number % 10 == 9:
        library.whole.remove(document.document_id)
        print(f"removed {number}", flush=True)
