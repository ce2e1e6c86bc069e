"""Convert an embedded base model from GGUF to a model folder: `python -m ft_dagster.model.gguf GGUF FOLDER`."""

import os
import shutil
import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file, and save its model (bfloat16) and tokenizer. The folder appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        trust_remote_code=False,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the model cannot be saved
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
