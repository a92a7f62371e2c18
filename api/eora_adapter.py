"""EoRA's corrections as a PEFT adapter: what an encoding lost, as the start of a fine-tuning.

The folder is an ordinary LoRA adapter of scaling 1::

    base = headrace.load("model-gptq")
    model = PeftModel.from_pretrained(base, "model-gptq/eora", is_trainable=True)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .saving import numbered_errors

EORA_FOLDER = "eora"


def write_eora_adapter(
    corrections: Mapping[str, Tensor], folder: Path, *, base: str, inputs_first: bool = False
) -> None:
    """Write ``NAME.weight.A`` (rank, in) and ``NAME.weight.B`` (out, rank) as a LoRA adapter.

    Ranks may differ: a matrix of fewer rows than the rank has a smaller one.  ``inputs_first``:
    the adapted layers keep their weights as (in, out), as GPT-2 does.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks: dict[str, int] = {}
    state: dict[str, Tensor] = {}
    for name, factor in corrections.items():
        weight, _, which = name.rpartition(".")
        module = weight.removesuffix(".weight")
        state[f"base_model.model.{module}.lora_{which}.weight"] = factor.contiguous()
        ranks[module] = factor.shape[0 if which == "A" else 1]
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        fan_in_fan_out=inputs_first,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    with numbered_errors(path):
        save_file(state, path, metadata={"format": "pt"})
