"""Fine-tuning a masked language model, with or without memory, on the tasks of GLUE and on SQuAD."""
