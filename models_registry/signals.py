"""What happens to a model that apps above want to know of, in the transaction in which it does."""

from __future__ import annotations

from django.dispatch import Signal

model_changed = Signal()
"""With `model`, and `is_ready`: it loads now, or (False) it did so far and does not any more."""
