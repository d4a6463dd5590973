"""The outputs of all stages of a small build."""

import pytest
from support.models.small_tokenizer import make_tokenizer
from support.outputs.report import (
    LADDER,
    METRICS,
    TRAINED,
    compared,
    evaluated,
    forgotten,
    hand_off_record,
    manifest,
    prompts_with_answers,
)

from tutor.prompt.encoding import RowEncoder
from tutor.stages.report.labels import labelled_runs
from tutor.stages.report.view import StageOutputs


@pytest.fixture
def outputs() -> StageOutputs:
    answers = prompts_with_answers()
    parity = {"conversations": 9, "transformers": "loaded", "served": "Q8_0", "hand_offs": [hand_off_record()]}
    files = {"files": {"tutor-Q8_0.gguf": {"size": 144_000_000, "replaced": {"Q5_1": 3}}}}
    fields = {"recipe.rank": 8, "recipe.alpha": 16, "recipe.target_modules": ["q_proj"], "recipe.epochs": 6,
              "recipe.learning_rate": 2e-4, "recipe.system": "Eres un tutor.", "version.torch": "2.14.0"}  # fmt: skip
    manifests = {
        "data": manifest("data", {"rows": 278, "train": 35, "held_out": 5, "prompts": 9, "notes": []}),
        "base": manifest("base", {"source": TRAINED["base_source"]}),
        "adapter": manifest("train", TRAINED, fields),
        "merged": manifest("merge", {"base": "nf4", "dtype": "float16"}),
        "gguf": manifest("convert", files, None, tutor__Q8_0=144_000_000, tutor__F16=270_000_000),
        "ladder": manifest("ladder", LADDER),
        "parity": manifest("parity", parity),
        "forgetting": manifest("forgetting", forgotten()),
        "eval": manifest("evaluate", evaluated(answers)),
        "eval-baselines": manifest("eval-baselines", compared(left_out={"base + 5 examples": "it is too long"})),
    }
    row = {"instruction": "¿Qué es una interfaz?", "response": "Una forma.", "line": 7}
    labels = labelled_runs(RowEncoder(make_tokenizer(add_bos=True)), row)
    more = {"paraphrased": answers[:1], "labels": labels, "language": "es", "machine": [("processor", "a CPU")]}
    return StageOutputs(name="demo", model="tutor", manifests=manifests, metrics=METRICS, answers=answers, **more)
