"""Tiny random models of many architectures, with the configurations of transformers."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

USUAL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "codegen": {**_GPT2, "rotary_dim": 8, "n_ctx": 512},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "mixtral": _EXPERTS,
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {},
    "stablelm": {},
    "starcoder2": {},
}
"""Architectures whose packed pieces do not see each other -> what their configurations need besides USUAL."""
PADDED: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gpt_oss": _EXPERTS,
    "granitemoehybrid": {
        **_EXPERTS,
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
}
"""The same for architectures whose packed pieces do."""


def tiny_model(family: str, **options: Any) -> PreTrainedModel:
    """Return a random model in float32, with weights that are large enough for its layers to have an effect."""
    content = {**USUAL, **(PACKED | PADDED)[family], **options}
    config = CONFIG_MAPPING[family](**{name: value for name, value in content.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() >= 2:
                weights.normal_(0, 0.5 if "embed" in name or "wte" in name else 0.12)
    return model.eval()
