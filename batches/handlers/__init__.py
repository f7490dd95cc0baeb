"""Result handlers: what can be done with a batch's results once it has ended.

`base.py` is what a handler is written against, the other modules are those that come along;
which of them an organization uses is in rows (`batches/models/handlers.py`), and the runs are
`services/handler_runs.py`'s.
"""
