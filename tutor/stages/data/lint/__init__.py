"""The linter of rows, for `tutor data lint`: doubtful rows with their lines, and figures of the whole set.

In: files of rows, usable or not; the held-out prompts to compare with; optionally the base's tokenizer. Out: a report
as JSON values, or as one HTML page.

`linter` compares rows, `rows` indexes a file and checks each row alone, `conversations` names the texts of a row,
`characters` finds garbled and invisible
characters, `near_duplicates` similar questions, `figures` computes lengths and tables, `page` renders the HTML page
from page.html.j2.

Is no stage: nothing depends on its findings, and it changes no file.
"""
