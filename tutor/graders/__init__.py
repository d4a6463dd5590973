"""Who decides about an answer: each judge turns a text into a verdict."""
