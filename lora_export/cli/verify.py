"""`lora-export verify`: prove that a file computes what the PyTorch model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.cli.arguments import TakesAdapters, cli_command, command_line, print_document
from lora_export.cli.failures import answered
from lora_export.cli.progress import shown
from lora_export.options.common import is_address
from lora_export.options.verify import VerifyOptions


@cli_command(
    VerifyOptions,
    "verify model.onnx --model base -a adapter --report verdict.xml",
    "verify merged --base base -a adapter",
    cls=TakesAdapters,
)
def verify_command(candidate: str, as_json: bool, **options: Any) -> int:
    """Prove that CANDIDATE computes what MODEL with its adapters attached computes.

    CANDIDATE is an .onnx, a TorchScript .pt, a .pt2 of torch.export, a merged Hugging Face folder, or a merged
    .safetensors file with MODEL's weights. MODEL is a Hugging Face folder, `package.module:factory`, `file.py:factory`
    or a .pt2; for a merged .gguf, the .gguf that it was merged into. The verdict is `same` (exit code 0), `different`
    (4) or `undecided` (5). Exit code 6 means that the requested provider did not do the work.

    CANDIDATE may also be the address of a server, such as https://host/v1: its log-probabilities are compared with
    those of MODEL. The key is in the variable LORA_EXPORT_API_KEY or OPENAI_API_KEY.

    A .pt2 is read without torch.export.load, which could run code from the file. Operators outside a closed list are
    refused by name.

    With --base and without --model, nothing is run: each changed tensor of a merged folder or file is compared with
    W + s·BA in fp64, and every other tensor with the bytes of the base. PyTorch is not needed.

    What was not judged, such as a pair whose effect is smaller than the allowed error, is listed below the verdict.
    With --strict it makes the verdict `undecided`.
    """
    from lora_export.api.verify import verify
    from lora_export.cli.verdicts import annotate_github, show_proof

    about = {"command": command_line()}
    with shown() as on_progress:
        result = verify(candidate, about=about, on_progress=on_progress, **options)
    answered()
    if as_json:
        print_document(result.as_document())
    elif result.error is None:
        show_proof(result.proof)
    annotate_github(result, f"verify {candidate if is_address(candidate) else Path(candidate).name}")
    if result.error is not None:
        raise result.error
    return result.exit_code
