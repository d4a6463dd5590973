"""Rows: questions with answers, as users write them and as the data stage writes them.

In: a user's JSON Lines file (or array, or gzip), or the data stage's folder. Out: checked rows with their line numbers
and notes on what was tolerated; the rows of a split.

`json_values` decodes one JSON value, `jsonl` the lines of a user's file, `rows` checks keys and texts of each row.
`split_files` reads the files of the data stage: every later stage uses it.

Does not deduplicate, compare or split rows (stages/data), and repairs nothing.
"""
