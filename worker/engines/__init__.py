"""The engines, and the one place that knows their names."""

from __future__ import annotations

from worker.engines.base import Engine, LoadFailed, ModelSpec


def make(spec: ModelSpec, gpu: str | None) -> Engine:
    """An engine for the model, not loaded yet; what it needs is imported only when it is used."""
    if spec.engine == "vllm":
        from worker.engines.vllm.engine import VllmEngine

        return VllmEngine(spec, gpu=gpu)
    if spec.engine == "openai":
        from worker.engines.openai import OpenAIEngine

        return OpenAIEngine(spec)
    if spec.engine == "instant":
        from worker.engines.instant import InstantEngine

        return InstantEngine(spec)
    raise LoadFailed(f"There is no engine {spec.engine!r}.")
