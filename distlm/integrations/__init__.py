"""distlm inside other programs: neighbours for Hugging Face's models and their `generate`, and a model of lm_eval."""
