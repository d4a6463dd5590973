"""Who answers: transformers, llama.cpp's programs, Ollama."""
