"""Small models, tokenizers, weights and GGUF files, and what training and merging them takes."""
