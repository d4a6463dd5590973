"""The report stage: the results of all other stages as one HTML page for people, and a model card for the hub.

In: the manifests and result files of the stages that have run; `model/published.json` and `parity-ollama/`, if
publishing and `tutor parity --host` have written them.
Out: `report/report.html` (no script, no network) and `report/README.md` (the model card).

stage.py       the stage: reads the folders, writes the two files
view.py        all values of the page; what is missing, with the command that makes it
tables.py      hand-offs, quantizations and verdicts as rows
charts.py      positions of curves and points
labels.py      training rows token by token, with the tokens that carry loss
prompts.py     prompts with their answers, and the filters
model_card.py  the model card
page.html.j2   the page's template

Does not: grade, compute a result, import another stage.
"""
