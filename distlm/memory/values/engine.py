"""What a DeepSpeed engine says about its steps, by public attributes; deepspeed itself is not imported."""

from typing import Any

from distlm.errors import UsageError


class EngineSteps:
    """Follows the steps of one engine, so that another optimizer can step with it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._steps, self._skipped = engine.global_steps, engine.skipped_steps
        self.scale = self._loss_scale()
        """What the engine multiplies losses with in the backwards under way."""

    @staticmethod
    def of(model: object) -> "EngineSteps | None":
        """None when `model` is no engine."""
        names = ("global_steps", "skipped_steps", "gradient_accumulation_steps", "fp16_enabled")
        return EngineSteps(model) if all(hasattr(model, name) for name in names) else None

    def next(self) -> tuple[bool, float] | None:
        """After `engine.step()`: None when it only counted a micro-batch; else whether it skipped the update (overflow)
        and the loss scale that the update's backwards had. Local.

        Raises UsageError when the engine has not stepped since the last call.
        """
        engine, scale = self.engine, self.scale
        steps, skipped = engine.global_steps - self._steps, engine.skipped_steps - self._skipped
        if not steps:
            if engine.gradient_accumulation_steps() == 1:
                raise UsageError("SparseValueOptimizer.step() before engine.step(); call it after")
            return None
        self._steps, self._skipped, self.scale = engine.global_steps, engine.skipped_steps, self._loss_scale()
        return skipped > 0, scale

    def _loss_scale(self) -> float:
        if not self.engine.fp16_enabled():
            return 1.0
        optimizer = self.engine.optimizer
        # ZeRO 0 has it in another place.
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        return float(scaler.cur_scale) if scaler is not None else 1.0
