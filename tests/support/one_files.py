"""What several tests share: adapters of a diffusion pipeline in memory, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from lora_export.lora import Adapter, LoraPair, component_name
from support.written import adapter_of, drawn_pairs

PARTS = ("denoiser", "text_encoder")


@st.composite
def drawn_adapters(draw: st.DrawFn) -> Adapter:
    """Pairs of linear layers in one or two models of a pipeline."""
    pairs: dict[str, LoraPair] = draw(drawn_pairs())
    named = {component_name(draw(st.sampled_from(PARTS)), name): pair for name, pair in pairs.items()}
    return adapter_of(named)
