"""What a masked language model is measured by: held-out loss, use of its memories, their cost."""
