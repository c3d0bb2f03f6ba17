"""Training with DeepSpeed: engine adapter, objective, loop, validation, checkpoints that fit any rank count."""
