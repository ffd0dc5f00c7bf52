"""Run by MLServer's Python: an ONNX graph, served by KServe's protocol.

python mlserver_graph.py FOLDER GRAPH PORT
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

TYPES = {"tensor(int64)": "INT64", "tensor(float)": "FP32"}


class Graph(MLModel):
    async def load(self) -> bool:
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        return True

    async def predict(self, payload: Any) -> InferenceResponse:
        feeds = {each.name: self.decode(each, default_codec=NumpyCodec) for each in payload.inputs}
        names = [each.name for each in self.session.get_outputs()]
        outputs = zip(names, self.session.run(names, feeds), strict=True)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(*each) for each in outputs])


def described(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            "datatype": TYPES[each.type],
            "shape": [-1 if isinstance(n, str) else n for n in each.shape],
        }
        for each in values
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(folder: str, graph: str, port: str) -> None:
    session = onnxruntime.InferenceSession(graph)
    model: dict[str, Any] = {"name": "m", "implementation": "mlserver_graph.Graph", "parameters": {"uri": graph}}
    model |= {"inputs": described(session.get_inputs()), "outputs": described(session.get_outputs())}
    ports = {"http_port": int(port), "grpc_port": free_port(), "metrics_port": free_port()}
    (Path(folder) / "model-settings.json").write_text(json.dumps(model))
    (Path(folder) / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0, **ports}))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    server = str(Path(sys.executable).with_name("mlserver"))
    os.execv(server, [server, "start", folder])


if __name__ == "__main__":
    main(*sys.argv[1:])
