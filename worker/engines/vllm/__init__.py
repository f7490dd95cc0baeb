"""vLLM as an engine: its own AsyncLLM and its own OpenAI serving layer, called in this process.

The only package that knows vLLM's import paths (0.26 to 0.33); no queue, no database, no HTTP.
"""
