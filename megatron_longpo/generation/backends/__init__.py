"""What writes questions and answers: a model in `transformers`, or an OpenAI-compatible server."""
