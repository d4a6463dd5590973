"""The data stage: a user's rows become training rows, held-out rows and prompts.

In: the recipe's JSONL files (`data.train`, perhaps `data.eval`) and its settings of shares and numbers of rows. Out:
train.jsonl, held_out.jsonl, prompts.jsonl and statistics.json: rows that share no question across the files.

`stage` runs it, `reading` reads a file without duplicates, `normal_form` has what two spellings of a question have in
common, `splitting` leaks, samples and the split, `held_out_prompts` makes prompts of held-out rows, `code_check`
compiles the code in rows for `tutor data check`, `base_tokens` finds the base's control tokens in rows, `lint/`
examines rows that need not be usable yet for `tutor data lint`.

Does not tokenize, and changes no row: a row that is not usable is an error with its line.
"""
