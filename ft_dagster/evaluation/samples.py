"""Samples of how models continue prompts. The prompts are always the same, and decoding is greedy."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ft_dagster.model.device import device

_REPETITION_PENALTY = 1.1
"""Without a penalty, greedy decoding of a small model falls into loops (CTRL, arXiv 1909.05858)."""


@torch.no_grad()
def continue_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """Return the text that a model adds to a prompt, at most `new_tokens` tokens."""
    if new_tokens == 0:
        return ""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).to(device())
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=_REPETITION_PENALTY,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
