"""Serve a classifier to many customers: requests that arrive together are one run of the graph.

    pip install fastapi uvicorn
    python samples/many_customers.py MODEL served.onnx ADAPTERS

MODEL has the tokenizer, `onnx MODEL --lora slots -a ADAPTER` made the graph, and ADAPTERS is a folder of files
CUSTOMER.onnx_adapter that `convert --for served.onnx` made. A new or changed file is served without a restart.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoTokenizer

import lora_export as le
from lora_export.errors import InputRefused

MOST_ROWS, WAIT = 32, 0.004  # texts of one run, and seconds for more of them to arrive


class Request(BaseModel):
    text: str
    customer: str | None = None  # None: the model itself


def make_app(model: str, graph: str, adapters: str) -> FastAPI:
    tokenizer, slots = AutoTokenizer.from_pretrained(model), le.AdapterSlots(graph, adapters)
    takes = {value.name for value in slots.session.get_inputs()}
    most = min(MOST_ROWS, slots.contract.slots)
    waiting: asyncio.Queue[tuple[Request, asyncio.Future[list[float]]]] = asyncio.Queue()

    def logits_of(requests: list[Request]) -> list[list[float]]:
        texts = tokenizer([one.text for one in requests], padding=True, truncation=True, return_tensors="np")
        feeds = {name: value for name, value in texts.items() if name in takes}
        feeds |= {name: np.zeros_like(texts["input_ids"]) for name in takes & {"token_type_ids"} - feeds.keys()}
        rows = slots.run(feeds, [one.customer for one in requests])["logits"].tolist()
        return [[logit for logit in row if logit > -9000] for row in rows]  # without absent labels

    async def run_batches() -> None:
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(WAIT)
            while len(batch) < most and not waiting.empty():
                batch.append(waiting.get_nowait())
            try:
                rows: list[Any] = await asyncio.to_thread(logits_of, [request for request, _ in batch])
            except Exception as error:  # noqa: BLE001 - each request of the batch gets it
                rows = [error] * len(batch)
            for (_, answer), row in zip(batch, rows, strict=True):
                if not answer.cancelled():
                    answer.set_exception(row) if isinstance(row, Exception) else answer.set_result(row)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(run_batches())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def classify(request: Request) -> list[float]:
        try:
            if request.customer is not None:  # an adapter that is refused fails here, and no batch
                await asyncio.wrap_future(slots.prefetch(request.customer))
        except InputRefused as error:
            raise HTTPException(404, str(error)) from error
        answer = asyncio.get_running_loop().create_future()
        await waiting.put((request, answer))
        return await answer

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(make_app(*sys.argv[1:4]))
