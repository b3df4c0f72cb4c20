"""Tiny random decoders of many families, for the tests of what is found by structure."""

from typing import Any

import torch
import transformers

TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = {**PLAIN, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 2}
OPT = {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
SLIDING = {**GROUPED, "sliding_window": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": SLIDING,
    "qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**SLIDING, "head_dim": 8},
    "gemma3_text": {**SLIDING, "head_dim": 8},
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": WIDE,
    "phi": WIDE,
    "phi3": WIDE,
    "bitnet": GROUPED,
    "smollm3": GROUPED,
    "falcon": PLAIN,
}


def decoder(family: str, seed: int = 0, **settings: Any) -> Any:
    """A frozen random model of six layers whose outputs differ from layer to layer."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model.requires_grad_(False).eval()


def tokens(rows: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    """Random text without special tokens, longer than any sliding window here."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
