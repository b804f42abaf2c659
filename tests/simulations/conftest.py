"""Fixtures shared with the strategies' tests: tiny models, texts and runs within one process."""

from tests.strategies.conftest import make_config, run_locally, texts, tiny_bert, tiny_llama

__all__ = ["make_config", "run_locally", "texts", "tiny_bert", "tiny_llama"]
