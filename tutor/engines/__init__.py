"""Engines that generate answers: transformers, the pinned llama.cpp, Ollama. None imports another.

In: a conversation and the settings of a generation. Out: an answer with its finish reason, streamed while it comes
(protocol.py), and for comparisons log-probabilities token by token (trace.py).

protocol   the `Engine` protocol, `Generation`, `Answer`
answer_limit  maximum tokens of an answer
trace      scores and greedy traces in one form for all engines, and the divergence of two distributions
hf/        transformers in this process
llamacpp/  programs of the pinned llama.cpp: conversion, quantization, scores, llama-server
ollama/    client of an Ollama server

Engines do not read build folders, do not grade answers and do not compare models: stages and serving do.
"""
