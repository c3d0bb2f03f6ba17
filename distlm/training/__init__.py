"""Training with DeepSpeed: engine adapter, loop, validation, checkpoints that fit any rank count; blocks/."""
