"""stages/report/model_card.py: the head, the figures, and that no text breaks out of the card."""

import json
from dataclasses import replace

from support.models.chat_templates import FACTS, SWITCH
from support.outputs.report import TRAINED, manifest

from tutor.prompt.template_analysis import analyse_template
from tutor.stages.report.model_card import card, escaped, hub_name
from tutor.stages.report.view import StageOutputs


def test_card_has_head_and_figures(outputs: StageOutputs) -> None:
    text = card(outputs)
    head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().split("\n"))
    assert json.loads(head["language"]) == ["es"]
    assert json.loads(head["base_model"]) == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert json.loads(head["library_name"]) == "gguf"
    assert json.loads(head["pipeline_tag"]) == "text-generation"
    assert "| tutor-Q8\\_0.gguf | 144.0 MB | 7.40 | 0.0060 |" in text
    assert "67 % (" in text
    assert "| chrF to its reference | 36.7 (33.3 to 38.9) | 36.7 (33.3 to 38.9) |\n" in text
    assert "\nchrF is the overlap of letter sequences with one reference answer, not correctness" in text
    assert "**Worse:** general texts" in text


def test_card_of_a_local_base_has_no_path_and_no_licence(outputs: StageOutputs) -> None:
    trained = {**TRAINED, "base_source": "path:/home/ana/secret"}
    text = card(replace(outputs, manifests={**outputs.manifests, "adapter": manifest("train", trained)}))
    assert "/home/ana" not in text
    assert "license" not in text
    assert "base_model" not in text


def test_card_says_how_to_prompt_with_the_bases_template(outputs: StageOutputs) -> None:
    prompt = analyse_template(SWITCH, FACTS, where="base", reasoning="rows")
    counted = {"rows": 30, "rows_of_several_turns": 4, "answers": 41, "most_turns": 3}
    text = card(replace(outputs, prompt=prompt, statistics={"train": counted}))
    assert "ends with `<|im_end|>`" in text
    assert "between `<think>` and `</think>`" in text
    assert "Instrucción" not in text
    assert "on 30 conversations with 41 answers" in text
    assert "set `think` to false" in card(replace(outputs, prompt=replace(prompt, reasoning="empty")))


def test_name_with_markup_is_escaped_in_the_card() -> None:
    assert escaped("a|b\n---\n<b>[x](y)") == "a\\|b --- &lt;b&gt;\\[x\\](y)"
    assert hub_name("hub:a/b@" + "0" * 40) == "a/b"
    assert hub_name("hub:a/b\n---\n@" + "0" * 40) == ""


def test_card_says_what_was_not_compared(outputs: StageOutputs) -> None:
    gate = outputs.manifests["parity"]
    missing = {**gate.results["hand_offs"][0], "state": "not checked", "missing": "3 GB are free"}
    changed = replace(gate, results={**gate.results, "hand_offs": [missing]})
    text = card(
        replace(
            outputs, manifests={**outputs.manifests, "parity": changed}, published={"not_checked": ["a -> b: 3 GB"]}
        )
    )
    assert "0 of 1 hand-offs between engines are within their tolerance" in text
    assert "**Not compared, so not proven:**" in text
    assert "**Published unchecked:** a -&gt; b: 3 GB" in text
