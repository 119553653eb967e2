"""Queues uploads in the library in argv[1], from number argv[2] on, and says of each when it is safe; they are read
meanwhile."""

import sys
from pathlib import Path

from retrieval import Library, RetrievalSettings
from retrieval.formats import reading
from retrieval.ingest import Into
from tests.retrieval.hashing import HashingEmbedder

library = Library.open(
    Path(sys.argv[1]), embedder=HashingEmbedder(), settings=RetrievalSettings(relevance_floor=0.2), reader=reading
)
library.jobs.start()
print("open", flush=True)
for number in range(int(sys.argv[2]), 10**9):
    library.jobs.add_upload(f"{number}.md", f"# Gate {number}\n\nThe key is number{number}x.".encode(), Into("default"))
    print(f"queued {number}", flush=True)
