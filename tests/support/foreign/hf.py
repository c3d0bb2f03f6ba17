"""Small randomly initialised models of Hugging Face with a tokenizer trained on a text, saved as a folder."""

from pathlib import Path
from typing import Any

import torch


def save_gpt2(folder: Path, text: Path, extra_rows: int = 0) -> Path:
    """A GPT-2 of two layers of width 32 with a byte-level BPE; `extra_rows` of its embedding have no piece."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text / "train.txt")], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size() + extra_rows, n_positions=96, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_llama(folder: Path, text: Path, begins: bool = False) -> Path:
    """A Llama of two layers of width 32, its softmax not tied, with a BPE that has no newline but </s>. With `begins`
    the tokenizer puts <s> in front of a text, as Llama's own does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _save_tokenizer(folder, text, ["<unk>", "<s>", "</s>"], begins)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_sizes(size))).save_pretrained(folder)
    return folder


def save_gemma2(folder: Path, text: Path) -> Path:
    """A Gemma 2 of two layers of width 32 whose logits are capped, hard enough that it shows, with <bos> in front of a
    text; one layer's attention sees 8 tokens."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = _save_tokenizer(folder, text, ["<unk>", "<bos>", "<eos>"], True)
    torch.manual_seed(0)
    config = Gemma2Config(
        **_sizes(size), head_dim=16, final_logit_softcapping=0.5, sliding_window=8, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def save_gemma4(folder: Path, text: Path) -> Path:
    """A Gemma 4 of two layers of width 32, with <bos> in front of a text. The scale of each layer, a persistent buffer,
    is not the 1 of a fresh model."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    size = _save_tokenizer(folder, text, ["<unk>", "<bos>", "<eos>"], True)
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        **{**_sizes(size), "global_head_dim": 16}, head_dim=16, sliding_window=8, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config)
    for place, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.3 + place)
    model.save_pretrained(folder)
    return folder


def save_deepseek(folder: Path, text: Path) -> Path:
    """A DeepSeek-V3 of two layers of width 32, the second one with experts, whose router's bias, a persistent buffer,
    is not the 0 of a fresh model."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    size = _save_tokenizer(folder, text, ["<unk>", "<s>", "</s>"], False)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **{**_sizes(size), "num_key_value_heads": 2}, moe_intermediate_size=16, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.randn(8))
    model.save_pretrained(folder)
    return folder


def _sizes(pieces: int) -> dict[str, Any]:
    return {
        "vocab_size": pieces, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96,
    }  # fmt: skip


def _save_tokenizer(folder: Path, text: Path, specials: list[str], begins: bool) -> int:
    """A BPE of 30 pieces; the second of `specials` is what a text begins with. The number of its pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=30, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator((text / "train.txt").read_text("utf-8").splitlines(), trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[1]} $A", special_tokens=[(specials[1], 1)]
        )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())
