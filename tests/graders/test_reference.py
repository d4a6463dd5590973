"""graders/reference.py: overlap with a reference, on answers in other words and with references exchanged."""

import json

from support.files import read_rows
from support.processes.command import ROOT

from tutor.graders.intervals import paired_values
from tutor.graders.reference import grade_references

ROWS = {row["instruction"]: row["response"] for row in read_rows(ROOT / "tests" / "support" / "cooking.jsonl")}
ANSWERS = {
    "Qu'est-ce qu'un roux ?": "C'est de la farine cuite dans du beurre, en parts égales. On s'en sert pour lier.",
    "Comment pocher un œuf ?": "Versez-le dans de l'eau frémissante vinaigrée, trois minutes. Sortez-le à l'écumoire.",
    "Comment préparer une pâte à crêpes ?": "Il faut de la farine, des œufs, du lait et un peu de beurre fondu. "
    "Fouettez le tout et laissez reposer la pâte une heure.",
    "Où faut-il garder les tomates ?": "Laissez-les à température ambiante : le froid leur fait perdre leur parfum.",
    "Pourquoi saler l'eau des pâtes ?": "Parce que les pâtes absorbent cette eau en cuisant : le sel entre dedans.",
    "Comment conserver l'ail ?": "Mettez l'ail dans un endroit sec et aéré. Au réfrigérateur, il germe.",
    "Comment faire une quiche lorraine ?": "Garnissez une pâte brisée de lardons, puis d'œufs battus avec de la crème. "
    "Enfournez à 180 degrés pendant une demi-heure.",
    "Quelle huile choisir pour la friture ?": "Prenez de l'huile de tournesol, qui ne fume pas à 180 degrés.",
}
"""Answers in other words than their reference, as a model writes them: shorter, in another order."""


def test_exchanged_references_score_clearly_worse() -> None:
    answers, references = list(ANSWERS.values()), [ROWS[question] for question in ANSWERS]
    own = grade_references(answers, references)
    swapped = grade_references(answers, [*references[1:], references[0]])
    found = paired_values([each["chrf"] for each in swapped if each], [each["chrf"] for each in own if each], seed=1)
    assert found.n == len(ANSWERS)
    assert found.low is not None
    assert found.low > 5, "points of chrF"
    control = paired_values(
        [each["chrf_other"] or 0.0 for each in own if each], [each["chrf"] for each in own if each], 1
    )
    assert control.low is not None
    assert control.low > 5


def test_scores_are_those_of_sacrebleu_from_0_to_100() -> None:
    text = ANSWERS["Comment pocher un œuf ?"]
    equal, nothing = grade_references([text, ""], [text, "Autre chose."])
    assert equal == {"chrf": 100.0, "chrf_other": 9.96}
    assert nothing == {"chrf": 0.0, "chrf_other": 0.0}


def test_missing_answer_or_reference_has_no_score() -> None:
    assert grade_references([None, "a"], ["b", ""]) == [None, None]
    (alone,) = grade_references(["Du beurre et de la farine."], ["Du beurre."])
    assert alone is not None
    assert alone["chrf_other"] is None


def test_repeated_reference_is_no_control_of_itself() -> None:
    """A paraphrased prompt has the reference of its original."""
    first, second, other = grade_references(["abc def", "abc def", "x"], ["abc def", "abc def", "ghi jkl"])
    assert first == second == {"chrf": 100.0, "chrf_other": 0.0}
    assert json.dumps(other)
