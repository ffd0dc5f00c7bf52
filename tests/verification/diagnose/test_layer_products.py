"""Layers as matrix products: the rows of inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_export import layers
from lora_export.verification.diagnose import layer_products
from lora_export.verification.diagnose.module_calls import CallValues


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"stride": 2}, {"padding": 2, "dilation": 2}, {"padding": (1, 0)}),
        *({"padding": "valid"}, {"padding": "same", "dilation": 2}, {"padding": "same"}),
    ],
)
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d])
def test_convolution_is_a_product_of_the_inputs_under_its_kernel(kind: Any, options: dict[str, Any]) -> None:
    if kind is torch.nn.Conv1d:
        options = {name: value[0] if isinstance(value, tuple) else value for name, value in options.items()}
    layer = kind(3, 4, 2 if kind is torch.nn.Conv1d else (2, 3), bias=False, **options).double()
    x = torch.randn(2, 3, *([9] if kind is torch.nn.Conv1d else [9, 8]), dtype=torch.float64)
    y = layer(x).detach().numpy()
    found = layer_products.convolution_rows(x.numpy(), y, layer)
    assert found is not None
    rows, outputs = found
    expected = rows @ layer.weight.detach().numpy().reshape(4, -1).T
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


def test_grouped_convolution_is_no_matrix_product() -> None:
    layer = torch.nn.Conv1d(4, 4, 2, groups=2)
    x = np.zeros((1, 4, 5))
    assert layer_products.convolution_rows(x, np.zeros((1, 4, 4)), layer) is None


def test_rows_of_a_linear_layer_and_an_embedding() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
    table, linear = layers.find_matrix_weights(module)
    ids = np.array([[4, 0], [1, 1]])
    rows = layer_products.product_rows(CallValues(ids, np.ones((2, 2, 3), np.float32)), table)
    assert rows is not None and rows[0].tolist() == [4, 0, 1, 1] and rows[1].shape == (4, 3)
    assert layer_products.weight_matrix(table).shape == (3, 5)  # (out, in): the embedding's table is stored (in, out)
    rows = layer_products.product_rows(CallValues(np.ones((2, 2, 3)), np.ones((2, 2, 2))), linear)
    assert rows is not None and (rows[0].shape, rows[1].shape) == ((4, 3), (4, 2))
    assert layer_products.product_rows(CallValues(None, np.ones((2, 2, 2))), linear) is None
    bias = layer_products.bias_of(linear)
    assert bias is not None and bias.dtype == np.float64
