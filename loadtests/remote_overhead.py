"""What a remote backend costs the gateway's processor for each token that streams through it, and how soon a server
notices that nobody listens any more.

    python -m loadtests.remote_overhead

A fake server in a process of its own streams 10,000 tokens, in OpenAI's and in Triton's protocol: as fast as they are
taken, over one stream and over ten at once, and one by one, so that each wakes the gateway.  CPU seconds are of this
process alone; the same bytes read by bare httpx, which is no part of what is ours to make fast, are measured in the
same run, and the arms alternate.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import aclosing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from inference import Backend, GenerationRequest, OpenAIConfig, Sampling, TextPrompt, TritonConfig, open_backend
from loadtests import report

RESULTS = Path(__file__).parent / "results"
TOKENS = 10_000
ROUNDS = 5
BETWEEN_SECONDS = 0.0003  # from one token to the next, where they come one by one
CANCELLED = 200
BAR_MS = 0.2
DONE = b"data: [DONE]\n\n"


def _chunks(path: str) -> list[bytes]:
    """A whole answer of one word a token, each an event in a chunk of its own."""
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    openai = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    triton = {"model_name": "m", "model_version": "1", "text_output": " word", "finish_reason": "None"}
    triton |= {"num_input_tokens": 5, "num_output_tokens": 1}
    if path.endswith("generate_stream"):
        events = [triton] * (TOKENS - 1) + [triton | {"finish_reason": "length"}]
    else:
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": TOKENS}}
        events = [openai] * (TOKENS - 1) + [openai | {"choices": [choice | {"finish_reason": "length"}]}, usage]
    data = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    data += [] if path.endswith("generate_stream") else [DONE]
    return [b"%x\r\n%s\r\n" % (len(each), each) for each in data] + [b"0\r\n\r\n"]


def _serve(port: Connection, gone: Connection) -> None:
    """Under `/paced` tokens come one by one; `/cancelled` says one word and waits: when its client goes away, the
    time of that is sent to `gone`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
                await reader.readexactly(length)
                path = lines[0].split(" ")[1]
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                kind, _, _ = path.removeprefix("/").partition("/")
                chunks = _chunks(path)
                if kind == "cancelled":
                    writer.write(chunks[0])
                    await reader.read(1)
                    gone.send(time.monotonic())
                    return
                for chunk in chunks if kind == "paced" else [b"".join(chunks)]:
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(BETWEEN_SECONDS if kind == "paced" else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def serving():
    """The URL of the fake server, and where it tells that clients left."""
    spawn = multiprocessing.get_context("spawn")
    port, port_end = spawn.Pipe(duplex=False)
    gone, gone_end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_serve, args=(port_end, gone_end), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.recv()}", gone
    finally:
        process.terminate()
        process.join()


def _request(number: int = 0) -> GenerationRequest:
    return GenerationRequest(request_id=f"r{number}", prompt=TextPrompt("word"), sampling=Sampling(max_tokens=TOKENS))


async def _through(backend: Backend, streams: int) -> float:
    """CPU milliseconds for each token."""

    async def one(number: int) -> None:
        events = 0
        async with aclosing(backend.generate(_request(number))) as stream:
            async for _ in stream:
                events += 1
        assert events == TOKENS + 1

    before = time.process_time()
    await asyncio.gather(*map(one, range(streams)))
    return 1000 * (time.process_time() - before) / (TOKENS * streams)


async def _bare(url: str) -> float:
    async with httpx.AsyncClient() as client:
        before = time.process_time()
        async with client.stream("POST", url, content=b"{}") as response:
            async for _ in response.aiter_raw():
                pass
        return 1000 * (time.process_time() - before) / TOKENS


async def _leaving(backend: Backend, gone: Connection) -> list[float]:
    """Milliseconds from an abort to the server's knowing."""
    times = []
    for number in range(CANCELLED):
        stream = backend.generate(_request(number))
        await anext(stream)
        before = time.monotonic()
        backend.abort(f"r{number}")
        await stream.aclose()
        times.append(1000 * (await asyncio.to_thread(gone.recv) - before))
    return times


async def measure() -> dict:
    rows: dict[str, list[float]] = {}
    with serving() as (url, gone), tempfile.TemporaryDirectory() as folder:
        triton = {"model": "m", "flavour": "vllm", "tokenizer": _tokenizer(folder)}
        openai = {"model": "m", "dialect": "vllm"}
        backends = {
            f"{name}{', one by one' if path else ''}": open_backend(config(base_url=url + path, **settings))
            for name, config, settings in (("openai", OpenAIConfig, openai), ("triton", TritonConfig, triton))
            for path in ("", "/paced")
        }
        for _ in range(ROUNDS):
            rows.setdefault("bare httpx", []).append(await _bare(url + "/v1/completions"))
            rows.setdefault("bare httpx, one by one", []).append(await _bare(url + "/paced/v1/completions"))
            for name, backend in backends.items():
                rows.setdefault(name, []).append(await _through(backend, 1))
                if "one by one" not in name:
                    rows.setdefault(f"{name}, ten streams", []).append(await _through(backend, 10))
        leaving = {}
        for name, config in (
            ("openai", OpenAIConfig(base_url=url + "/cancelled", **openai)),
            ("triton", TritonConfig(base_url=url + "/cancelled", **triton)),
        ):
            backend = open_backend(config)
            leaving[name] = report.summarise(await _leaving(backend, gone))
            await backend.close()
        for backend in backends.values():
            await backend.close()
    return {"cpu_ms_per_token": rows, "leaving_ms": leaving}


def _tokenizer(folder: str) -> str:
    """The smallest that there is: raw text needs none, but Triton's settings name one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"word": 0}, "word"))).save_pretrained(folder)
    return folder


def main() -> None:
    measured = asyncio.run(measure())
    rows = measured["cpu_ms_per_token"]
    lines = [
        "# A remote backend's own time",
        "",
        f"`python -m loadtests.remote_overhead`: CPU time of this process for each of {TOKENS:,} tokens of a stream, "
        f"{ROUNDS} rounds, arms in turn. Wanted: under {BAR_MS} ms.",
        "",
        "| what | median, ms | least | most |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {statistics.median(t):.4f} | {min(t):.4f} | {max(t):.4f} |" for name, t in rows.items()),
        "",
        f"From an abort to the server's knowing, {CANCELLED} streams each. Wanted: under a second.",
        "",
        "| protocol | p50, ms | p99 | most |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['p50_ms']:g} | {row['p99_ms']:g} | {row['max_ms']:g} |"
            for name, row in measured["leaving_ms"].items()
        ),
    ]
    report.write(RESULTS, "remote_overhead", lines, measured)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
