"""Deterministic graders of one answer ("judge" in this field is an LLM; none is used here).

In: an answer's text and finish reason, and the prompt with its expectations: code that compiles, concepts, a language.
Out: verdicts, one per property, and reasons for people.

verdict      all verdicts on an answer together, as answers.json holds them
code         fenced code blocks against what their rows or prompts state
typescript/  the pinned TypeScript compiler, its scanner and its installation
identifiers  names in given code that a correction lacks
format       form of the text: complete, no loop, no text of the prompt template
language     whether prose is in a language
copied_text  the longest run shared with a training text
reference    overlap with the reference answer of the prompt (chrF)
intervals    Wilson's interval, the paired bootstrap, and the conclusion of a difference

Equal inputs give equal verdicts. Does not start a model, read a recipe or count over answers: the evaluate stage
computes rates with the intervals.
"""
