"""The prompt: how a conversation becomes the text and the ids of training, and of every engine.

messages.py       conversations as messages, and answers as people see them
format.py         `PromptFormat`: what every format provides
tutor_format.py   the format of this project, Instrucción / Respuesta (the recipe's prompt = "tutor")
base_format.py    the base's own chat template (prompt = "base"), rendered by jinja.py
template_analysis.py, thoughts.py   what a base's template gives, or why it cannot be served as trained
fixed_template.py   that template, rendered the same by every engine
encoding.py       rows as ids and loss mask, and the audit of them

Does not load a tokenizer, and reads no file.
"""
