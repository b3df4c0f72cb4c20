"""A small random Llama with LoRA and hand-made examples, for the tests of training and evaluation."""

import peft
import torch
import transformers

from fedmpi.data.prompts import IGNORED, Example

PAD = 0


def llama(seed: int = 0, layers: int = 2, vocab: int = 50, spread: float = 0.02) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=spread,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False).eval()


def with_lora(model: torch.nn.Module, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, lora)


def examples(count: int, seed: int = 0, vocab: int = 50) -> list[Example]:
    """Prompts and responses of unequal lengths; the second half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * (length // 2) + ids[length // 2 :], f"row{index}"))
    return made


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
