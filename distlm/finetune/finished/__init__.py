"""Fine-tuned models that are finished: evaluating one alone, and giving it to other programs."""
