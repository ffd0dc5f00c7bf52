"""What a module returns has names: nested tensors, and the fields of dataclasses."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import RuntimeRefused
from lora_export.models import export, export_program
from lora_export.models.load import from_module
from lora_export.models.outputs import distinct_outputs, have_names, named_outputs, with_dictionaries
from lora_export.verification.module_copies import limit_outputs
from support.graphs import run

pytestmark = pytest.mark.exports
ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (ONE, ["output_0"]),
        ((ONE, None, TWO), ["output_0", "output_2"]),
        ({"logits": ONE, "loss": None, "states": (TWO, TWO)}, ["logits", "states.0", "states.1"]),
        ([{"a": ONE}], ["output_0.a"]),
    ],
)
def test_outputs_are_named_by_keys_or_positions(outputs: object, names: list[str]) -> None:
    assert list(named_outputs(outputs)) == names
    assert have_names(named_outputs(outputs)) is (names[0] == "logits")


def test_outputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(RuntimeRefused, match="the model returned dict, which contains no tensors"):
        named_outputs({"loss": None})


@pytest.mark.parametrize("outputs", [{0: ONE, "0": TWO}, {"a": {"b": ONE}, "a.b": TWO}], ids=["keys", "nested"])
def test_two_outputs_of_one_name_are_refused(outputs: object) -> None:
    with pytest.raises(RuntimeRefused, match=r"two outputs of the name (0|a\.b)\. Give each"):
        named_outputs(outputs)


@dataclass
class Scores:
    scores: Tensor
    is_large: Tensor
    rest: tuple[Tensor, ...] | None = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        scores = self.linear(x) * scale
        return Scores(scores, scores > 0)


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), [Scores(x, x > 0, rest=(x + 1,))]


class Mapped(Net):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(y=self.linear(x))


class Repeated(Net):
    """It returns values twice, what it is given, a weight, and what is no tensor."""

    def forward(self, x: Tensor) -> Any:
        scores, weight = self.linear(x), self.linear.weight
        return {"one": scores, "other": scores, "given": x, "of_weight": weight, "number": 3, "nothing": None}


X = torch.tensor([[1.0, 2, 3], [-4, 5, -6]])


def test_a_dataclass_is_a_graph_of_its_fields() -> None:
    model = from_module(Net(), X)
    graph = export.to_onnx(model.module, {"x": X}, axes=model.axes)
    outputs = run(graph, x=X.numpy()[:1])
    expected = Net.forward(model.module, X[:1])
    torch.testing.assert_close(torch.tensor(outputs["scores"]), expected.scores)
    assert outputs["is_large"].tolist() == expected.is_large.tolist()


def test_an_output_may_be_another_an_input_or_a_weight() -> None:
    module = Repeated().eval()
    graph = export.to_onnx(module, {"x": X}, axes={"x": {0: "batch"}})
    assert set(graph.graph.initializers) == {"linear.weight", "linear.bias"}
    outputs, expected = run(graph, x=X.numpy()[:1]), named_outputs(module(X[:1]))
    assert list(outputs) == list(expected) == ["one", "other", "given", "of_weight"]
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(outputs[name]), value.detach())
    assert "forward" not in vars(module) and module(X)["number"] == 3


@pytest.mark.parametrize(("name", "others"), [("x", "inputs"), ("scale", "tensors")])
def test_an_output_with_the_name_of_another_value_is_refused(name: str, others: str) -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Any:
            return {name: self.linear(x) * self.scale}

    module = Named()
    module.register_buffer("scale", torch.ones(2))
    with pytest.raises(RuntimeRefused, match=rf"has outputs and {others} of one name: {name}\. .* Rename the keys"):
        export.to_onnx(module.eval(), {"x": X}, axes={"x": {0: "batch"}})


def test_a_traced_module_returns_the_fields_by_name() -> None:
    script = export_program.to_torchscript(from_module(Net(), X).module, {"x": X})
    assert set(script(X)) == {"scores", "is_large"}


def test_an_export_keeps_the_signature_that_a_method_states() -> None:
    module = Net()
    limit_outputs(module, ["scores"])
    before = inspect.signature(module.forward)
    with distinct_outputs(module):
        assert inspect.signature(module.forward).parameters == before.parameters
    assert list(before.parameters) == ["x", "scale"]


def test_copies_return_dictionaries_and_keep_the_signature() -> None:
    module = with_dictionaries(Net(), {"x": X})
    assert type(module).__name__ == "Net" and isinstance(module, Net)
    assert list(inspect.signature(module.forward).parameters) == ["x", "scale"]
    assert set(copy.deepcopy(module)(X, scale=1.0)) == {"scores", "is_large"}
    assert isinstance(Net()(X), Scores)  # other modules of the class do not change


def test_dataclasses_inside_tuples_are_dictionaries() -> None:
    outputs = with_dictionaries(Pair(), {"x": X})(X)
    assert set(outputs[1][0]) == {"scores", "is_large", "rest"} and outputs[1][0]["rest"][0].equal(X + 1)


def test_other_modules_are_left_as_they_are() -> None:
    for module, inputs in ((Mapped(), {"x": X}), (Net(), {"x": torch.ones(2, 9)}), (nn.Linear(3, 2), {"input": X})):
        assert type(with_dictionaries(module, inputs)) in (Mapped, Net, nn.Linear)
