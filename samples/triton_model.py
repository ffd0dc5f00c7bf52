"""Serve a graph of slots from Triton: a model of its Python backend, and the folder that Triton wants.

    python samples/triton_model.py served.onnx ADAPTERS REPOSITORY
    tritonserver --model-repository REPOSITORY  # where lora_export, without PyTorch, is installed

`onnx ENCODER --lora slots` made the graph, and ADAPTERS is a folder of files NAME.onnx_adapter that `convert --for
served.onnx` made. Triton's server was not run with it: the tests run `execute` as Triton calls it, and the schema of
tritonclient 2.73 read the configuration.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import lora_export as le

ADAPTER = "adapter"  # the input with the adapter's name of each row; "" is the model itself
TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
CONFIG = """name: "served"
backend: "python"
max_batch_size: {rows}
dynamic_batching {{ max_queue_delay_microseconds: 4000 }}
instance_group [{{ kind: KIND_CPU count: 1 }}]
input [
  {inputs}
]
output [
  {outputs}
]
"""


class TritonPythonModel:
    """What Triton makes of this file: `execute` gets the requests that arrived together, and answers each of them."""

    def initialize(self, _: dict[str, str]) -> None:
        here = Path(__file__).parent
        self.slots = le.AdapterSlots(next(here.glob("*.onnx")), here / "adapters")

    def execute(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as triton  # the server has it, and no other place

        try:
            answers = self.answered(requests)
            return [triton.InferenceResponse([triton.Tensor(*row) for row in rows.items()]) for rows in answers]
        except Exception as error:  # noqa: BLE001  one request can cause it: then each runs by itself, and that one fails alone
            if len(requests) == 1:
                return [triton.InferenceResponse(error=triton.TritonError(str(error)))]
            return [answer for request in requests for answer in self.execute([request])]

    def answered(self, requests: list[Any]) -> list[dict[str, Any]]:
        """The outputs of each request, computed together."""
        import triton_python_backend_utils as triton

        def read(name: str) -> list[Any]:
            return [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]

        adapters = [[name.decode() or None for name in array[:, 0]] for array in read(ADAPTER)]
        inputs = {name: read(name) for name in own(self.slots)}
        for names, *arrays in zip(adapters, *inputs.values(), strict=True):
            shapes = {array.shape for array in arrays}  # padded, another shape would not be seen
            if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != len(names) for shape in shapes):
                raise ValueError(f"the inputs are no [{len(names)}, tokens]: {shapes}")
        feeds = {name: in_one(arrays) for name, arrays in inputs.items()}
        results = self.slots.run(feeds, [name for names in adapters for name in names])
        ends = np.cumsum([len(names) for names in adapters])[:-1]
        parts = {name: np.split(value, ends) for name, value in results.items()}
        return [{name: parts[name][number] for name in parts} for number in range(len(requests))]


def own(slots: le.AdapterSlots) -> dict[str, Any]:
    """The inputs that are neither adapters nor their choice."""
    others = {*slots.contract.inputs, "adapter_ids", "adapter_scales"}
    return {value.name: value for value in slots.session.get_inputs() if value.name not in others}


def in_one(arrays: list[Any]) -> Any:
    """[rows, tokens] of all requests, filled with zeros: the attention mask has zeros there, too."""
    most = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, [(0, 0), (0, most - array.shape[1])]) for array in arrays])


def write_repository(graph: Path, adapters: Path, repository: Path) -> None:
    slots = le.AdapterSlots(graph, adapters)
    ragged = " allow_ragged_batch: true"  # requests of other lengths share a batch, too
    inputs = [f'{{ name: "{ADAPTER}" data_type: TYPE_STRING dims: [ 1 ] }}']
    inputs += [line(value, ragged) for value in own(slots).values()]
    version = repository / "served" / "1"
    version.mkdir(parents=True)
    shutil.copy(__file__, version / "model.py")
    for path in graph.parent.glob(f"{graph.name}*"):  # and its weights, where they are beside it
        shutil.copy(path, version)
    (version / "adapters").mkdir()
    for path in adapters.glob("*.onnx_adapter"):
        shutil.copy(path, version / "adapters")
    outputs = [line(value) for value in slots.session.get_outputs()]
    lists = {"inputs": ",\n  ".join(inputs), "outputs": ",\n  ".join(outputs)}
    (version.parent / "config.pbtxt").write_text(CONFIG.format(rows=min(32, slots.contract.slots), **lists))


def line(value: Any, more: str = "") -> str:
    sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in value.shape[1:])
    return f'{{ name: "{value.name}" data_type: {TYPES[value.type]} dims: [ {sizes} ]{more} }}'


if __name__ == "__main__":
    write_repository(*map(Path, sys.argv[1:4]))
