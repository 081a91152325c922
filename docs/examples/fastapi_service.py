"""A web service that answers questions, with streaming, health, and honest 503s.

    uvicorn fastapi_service:app --port 8000
    curl 'localhost:8000/ask?question=Who+wrote+Faust?'
    curl -N 'localhost:8000/stream?question=Who+wrote+Faust?'
    curl 'localhost:8000/health'

Needs `fastapi` and `uvicorn`. Set OPENAI_API_KEY, and ANTHROPIC_API_KEY for the fallback; MODEL and
FALLBACK name other models.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dspy
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from dspy_resilient import (
    AllTargetsFailedError,
    CallRejectedError,
    HealthState,
    LimitPolicy,
    ResilientLM,
    RetryPolicy,
)

qa = dspy.Predict("question -> answer")
streamed_qa = dspy.streamify(
    qa, stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")]
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the client when the worker starts, and let calls under way finish when it stops."""
    app.state.lm = ResilientLM(
        os.environ.get("MODEL", "openai/gpt-4o-mini"),
        name="service",
        max_wait=0,  # a user waits: another model, or an honest error, but no waiting for an outage
        deadline=20.0,
        retry=RetryPolicy(max_attempts=2),
        limits=LimitPolicy(max_concurrent=64, max_queue=128),
        fallbacks=[os.environ.get("FALLBACK", "anthropic/claude-haiku-4-5")],
    )
    yield
    await app.state.lm.aclose(grace=10)


app = FastAPI(lifespan=lifespan)


@app.exception_handler(CallRejectedError)
@app.exception_handler(AllTargetsFailedError)
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """Say 503, and when it makes sense to come back."""
    wait = getattr(error, "retry_after", None)
    headers = {} if wait is None else {"Retry-After": str(max(1, round(wait)))}
    return JSONResponse({"error": "Please try again soon."}, 503, headers)


@app.exception_handler(dspy.LMError)
async def failed(request: Request, error: dspy.LMError) -> JSONResponse:
    """Say 504 if the deadline passed, else 502: the model would not answer this question."""
    late = type(error).__name__ == "DeadlineExceededError"
    return JSONResponse({"error": type(error).__name__}, 504 if late else 502)


@app.get("/ask")
async def ask(question: str) -> dict[str, str]:
    """Answer in one piece."""
    with dspy.context(lm=app.state.lm):
        prediction = await qa.acall(question=question)
    return {"answer": prediction.answer}


@app.get("/stream")
async def stream(question: str) -> StreamingResponse:
    """Answer word by word. An error before the first word is still a 503: it is waited for."""
    words: asyncio.Queue[str | None] = asyncio.Queue()

    async def ask_model() -> None:
        streamed = False
        try:
            with dspy.context(lm=app.state.lm):
                async for part in streamed_qa(question=question):
                    if isinstance(part, dspy.streaming.StreamResponse):
                        streamed = True
                        await words.put(part.chunk)
                    elif isinstance(part, dspy.Prediction) and not streamed:
                        await words.put(part.answer)  # from the cache, in one piece
        finally:
            await words.put(None)

    asking = asyncio.create_task(ask_model())
    first = await words.get()
    if first is None:
        await asking  # raises what went wrong

    async def body() -> AsyncIterator[str]:
        try:
            word = first
            while word is not None:
                yield word
                word = await words.get()
        finally:
            asking.cancel()  # the user has gone away

    return StreamingResponse(body(), media_type="text/plain")


@app.get("/health")
async def health() -> JSONResponse:
    """Say whether the primary is being asked; a load balancer needs the status only."""
    now = app.state.lm.health()
    body = {"state": now.state, "retry_after": now.retry_after, "in_flight": now.in_flight}
    dead = now.state in {HealthState.BROKEN, HealthState.CLOSED}
    return JSONResponse(body, 503 if dead else 200)
