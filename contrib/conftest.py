"""The fixtures of `tests/` for the tests that lie beside what they test."""

from tests.conftest import close_log_handlers, new_checkout, tiny_checkpoint, tiny_model, tiny_tokenizer  # noqa: F401
