"""engines/llamacpp/score.py and src/score.cpp, with fake programs and (marked llamacpp) with the pinned build."""

from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp import script
from support.models.random_llama import TEXTS

from tutor.engines.llamacpp.convert import quantize
from tutor.engines.llamacpp.score import reference_bytes, score
from tutor.errors import ArtifactError
from tutor.formats.models.gguf import read_gguf

SCORER = """
import json, sys
for line in sys.stdin:
    n, *ids = map(int, line.split())
    answer = ids[n:]
    print(json.dumps({"logprobs": [-i / 8 for i in answer], "top": [[[i, -0.5]] for i in answer]}), flush=True)
    print("a warning " * 20, file=sys.stderr)
"""

COMPARER = """
import json, sys
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
if "--write-reference" in options:
    open(options["--write-reference"], "w").write("distributions")
for line in sys.stdin:
    n, *ids = map(int, line.split())
    count = len(ids) - n
    score = {"logprobs": [-1.0] * count, "top": [[[1, -0.5]]] * count}
    if "--reference" in options:
        score |= {"kl": [0.25] * count, "same": [0, 1, 1, 1][:count]}
    print(json.dumps(score))
"""


def test_scores_of_many_rows_keep_their_order(build: Path) -> None:
    script(build, "tutor-score", SCORER)
    rows = [([1, 2, 3], [row % 50, 8]) for row in range(5000)]
    scores = score(build / "a.gguf", rows, threads=1)
    assert [item.logprobs for item in scores] == [(-(row % 50) / 8, -1.0) for row in range(5000)]
    assert scores[9].top == (((9, -0.5),), ((8, -0.5),))


def test_scores_of_no_rows_start_no_program(build: Path) -> None:
    script(build, "tutor-score", "raise SystemExit(1)")
    assert score(build / "a.gguf", [], threads=1) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('print(\'{"logprobs":[-inf],"top":[[[1,nan]]]}\')', "not finite"),
        (
            "import sys; sys.stderr.write('tutor-score: token id 9 is outside the vocabulary, invalid'); sys.exit(1)",
            "id 9",
        ),
        ('print(\'{"logprobs":[-1.0],"top":[[[1,-1.0]]]}\')', "other scores"),
    ],
)
def test_missing_or_invalid_scores_raise_artifact_error(build: Path, text: str, what: str) -> None:
    script(build, "tutor-score", text)
    with pytest.raises(ArtifactError, match=what):
        score(build / "a.gguf", [([1], [2]), ([1], [2])], threads=1)


def test_reference_is_written_first_and_compared_next(build: Path, tmp_path: Path) -> None:
    script(build, "tutor-score", COMPARER)
    reference, rows = tmp_path / "reference.bin", [([1], [2, 3])]
    (first,) = score(build / "a.gguf", rows, threads=1, reference=reference)
    (second,) = score(build / "b.gguf", rows, threads=1, reference=reference)
    assert (first.kl, first.same) == ((), ())
    assert (second.kl, second.same) == ((0.25, 0.25), (False, True))


def test_missing_comparison_raises_artifact_error(build: Path, tmp_path: Path) -> None:
    script(build, "tutor-score", COMPARER.replace('if "--reference"', 'if "--never"'))
    (tmp_path / "reference.bin").touch()
    with pytest.raises(ArtifactError, match="other scores"):
        score(build / "a.gguf", [([1], [2])], threads=1, reference=tmp_path / "reference.bin")


# The pinned build


@pytest.mark.llamacpp
def test_scores_equal_log_softmax_of_transformers(random_llama: Path, model: Any, tokenizer: Any) -> None:
    import torch
    from support.tolerances import half_error, largest_logit

    rows = [(tokenizer(text)["input_ids"], tokenizer(" sí", add_special_tokens=False)["input_ids"]) for text in TEXTS]
    bound = half_error(model.config) * largest_logit(model, rows)
    scores = score(random_llama / "tiny-F16.gguf", rows, threads=2, top=3)
    for (prompt, answer), scored in zip(rows, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        best, chosen = expected.max(-1).values, [top[0][0] for top in scored.top]
        assert scored.logprobs == pytest.approx(expected[range(len(answer)), answer].tolist(), abs=bound)
        # The best token, or one whose distance from it is within the rounding of two tokens.
        assert (best - expected[range(len(answer)), chosen]).max() <= 2 * bound
        assert [top[0][1] for top in scored.top] == pytest.approx(best.tolist(), abs=bound)


@pytest.mark.llamacpp
def test_divergence_equals_formula_on_full_distributions(random_llama: Path, tmp_path: Path) -> None:
    import numpy as np

    quantize(random_llama / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", 1)
    rows, files = [([5, 6, 7], [8, 9, 10]), ([7], [12])], (random_llama / "tiny-F16.gguf", tmp_path / "q.gguf")
    full = []
    for path in files:
        vocabulary = len(read_gguf(path).fields["tokenizer.ggml.tokens"])
        positions = [top for item in score(path, rows, threads=1, top=vocabulary) for top in item.top]
        full.append(np.array([[logprob for _, logprob in sorted(top)] for top in positions]))
    expected = (np.exp(full[0]) * (full[0] - full[1])).sum(-1)
    reference = tmp_path / "reference.bin"
    score(files[0], rows, threads=1, reference=reference)
    assert reference.stat().st_size == 16 + reference_bytes(rows, vocabulary)
    itself, other = (score(path, rows, threads=1, reference=reference) for path in files)
    assert [value for item in other for value in item.kl] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert min(value for item in other for value in item.kl) > 1e-4
    same = (full[0].argmax(-1) == full[1].argmax(-1)).tolist()
    assert [value for item in other for value in item.same] == same
    assert max(abs(value) for item in itself for value in item.kl) < 1e-5
    assert all(value for item in itself for value in item.same)


@pytest.mark.llamacpp
def test_reference_of_other_rows_is_refused(random_llama: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.bin"
    score(random_llama / "tiny-F16.gguf", [([5], [6, 7])], threads=1, reference=reference)
    with pytest.raises(ArtifactError, match="not of these rows"):
        score(random_llama / "tiny-F16.gguf", [([5], [6])], threads=1, reference=reference)
    reference.write_bytes(reference.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="cut short"):
        score(random_llama / "tiny-F16.gguf", [([5], [6, 7])], threads=1, reference=reference)


@pytest.mark.llamacpp
def test_id_outside_the_vocabulary_is_refused(random_llama: Path) -> None:
    with pytest.raises(ArtifactError, match="outside the vocabulary"):
        score(random_llama / "tiny-F16.gguf", [([1], [100000])], threads=1)
