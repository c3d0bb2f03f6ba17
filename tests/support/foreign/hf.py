"""Small randomly initialised models of Hugging Face with a tokenizer trained on a text, saved as a folder."""

from pathlib import Path

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


def save_llama(folder: Path, text: Path) -> Path:
    """A Llama of two layers of width 32, its softmax not tied, with a BPE that has no newline but </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=30, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((text / "train.txt").read_text("utf-8").splitlines(), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
