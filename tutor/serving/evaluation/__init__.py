"""Models asked the held-out prompts, and their graded answers compared.

In: the build folder of a recipe whose data stage has run, names of models. Out: answers with their verdicts in the
build folder, and differences paired by prompt.

    compare         the held-out prompts answered by any model; two models compared prompt by prompt

Publishes nothing: serving/promote.py uses these answers to decide what is served.
"""
