"""Fakes of what tutor starts or talks to: Ollama, Docker, nvidia-smi, llama.cpp's programs, the TypeScript compiler."""
