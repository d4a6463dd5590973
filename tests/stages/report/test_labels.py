"""stages/report/labels.py: the tokens of a row and those that carry loss."""

from dataclasses import replace
from typing import Any

from support.models.chat_templates import CHATML, FACTS
from support.models.small_tokenizer import make_tokenizer

from tutor.prompt.encoding import RowEncoder
from tutor.prompt.template_analysis import analyse_template
from tutor.stages.report.labels import labelled_runs, sample_rows


def test_only_completion_and_eos_carry_loss(tokenizer: Any) -> None:
    row = {"instruction": "¿Qué es 👩‍💻?", "response": "Una forma.\nY ñ.", "line": 3}
    (found,) = labelled_runs(RowEncoder(tokenizer, system="Eres un tutor."), row)
    assert [run["carries_loss"] for run in found["runs"]] == [False, True]
    prompt, answer = ("".join(token["text"] for token in run["tokens"]) for run in found["runs"])
    assert prompt.endswith("Eres un tutor.↵\n↵\nInstrucción: ¿Qué es 👩‍💻?↵\nRespuesta:")
    assert answer == " Una forma.↵\nY ñ.<｜end▁of▁sentence｜>"
    assert found["runs"][1]["tokens"][-1]["special"]
    assert found["runs"][0]["tokens"][0]["special"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert 0 < found["supervised"] < found["tokens"]


def test_row_of_several_turns_is_shown_as_it_is_trained(tokenizer: Any) -> None:
    history = [{"role": "user", "content": "¿Qué es any?"}, {"role": "assistant", "content": "Un tipo."}]
    first, second = labelled_runs(RowEncoder(tokenizer), {"instruction": "¿Y?", "response": "No.", "history": history})
    shown = ["".join(token["text"] for run in each["runs"] for token in run["tokens"]) for each in (first, second)]
    assert shown[0].endswith("¿Qué es any?↵\nRespuesta: Un tipo.<｜end▁of▁sentence｜>".replace("\\n", "\n"))
    assert "Respuesta: Un tipo.↵\n↵\nInstrucción: ¿Y?" in shown[1]
    assert [(each["part"], each["parts"], each["turns"]) for each in (first, second)] == [(1, 2, 2), (2, 2, 2)]


def test_turns_of_a_template_that_continues_itself_are_one_text() -> None:
    made = make_tokenizer(add_bos=True)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    prompt = analyse_template(CHATML, replace(FACTS, add_bos=True), where="base", reasoning="none")
    encoder = RowEncoder(made, replace(prompt, end_id=made.convert_tokens_to_ids("<|im_end|>")))
    history = [{"role": "user", "content": "¿Qué es any?"}, {"role": "assistant", "content": "Un tipo."}]
    row = {"instruction": "¿Y?", "response": "No."}
    (found,) = labelled_runs(encoder, {**row, "history": history})
    assert [run["carries_loss"] for run in found["runs"]] == [False, True, False, True]
    assert (found["part"], found["parts"], found["turns"]) == (1, 1, 2)
    assert [run.get("answer") for run in found["runs"]] == [None, 1, None, 2]
    (last,) = labelled_runs(replace(encoder, loss="last"), {**row, "history": history})
    assert [run.get("answer") for run in last["runs"]] == [None, 2]


def test_shortest_middle_and_longest_rows_are_sampled() -> None:
    rows = [{"instruction": "x" * size, "response": ""} for size in (5, 1, 9, 3, 7)]
    assert [len(row["instruction"]) for row in sample_rows(rows)] == [1, 5, 9]
    assert sample_rows(rows[:1]) == rows[:1]
    assert sample_rows([]) == []
    rows[2]["history"] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert [len(row["instruction"]) for row in sample_rows(rows)] == [1, 9], "one that has several turns"
