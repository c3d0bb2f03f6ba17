"""Models as Hugging Face folders that need no distlm: code, weights, tokenizer, model card. What all kinds share."""
