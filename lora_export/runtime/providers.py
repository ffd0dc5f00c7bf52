"""The execution providers by the names of `provider`, and the environment variables that change results."""

from __future__ import annotations

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}  # `provider` -> onnxruntime's name

ARITHMETIC_VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": "0 turns TF32 off and 1 turns it on in every CUDA library, whatever the program asks for",
    "ORT_CUDA_GEMM_OPTIONS": "changes how onnxruntime multiplies matrices on CUDA",
}
VARIABLES = {"CUDA_VISIBLE_DEVICES": "the GPUs that programs may see", **ARITHMETIC_VARIABLES}  # name -> effect
