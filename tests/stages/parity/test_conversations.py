"""stages/parity/conversations.py: the set of conversations, and the reach of each."""

from tutor.prompt.tutor_format import TUTOR, TutorFormat, render
from tutor.stages.parity.conversations import CODE, EMOJI, SPECIALS, Conversation, make_conversations


def fits(prompt: str) -> bool:
    return len(prompt) <= 2000


def test_conversations_include_texts_that_often_break() -> None:
    found = {
        item.name: item
        for item in make_conversations([{"instruction": "¿Qué?", "response": "Eso."}], "Eres «tutor».", fits)
    }
    assert {"held-out 1", "accents", "code", "emoji", "special tokens", "several turns", "empty system"} <= set(found)
    assert ("\t" in CODE, "`" in CODE, "\u200d" in EMOJI, "<｜User｜>" in SPECIALS) == (True,) * 4
    assert found["empty system"].messages[0] == {"role": "system", "content": ""}
    assert "Eres" not in found["empty system"].prompt(TUTOR)
    assert sum(message["role"] == "user" for message in found["several turns"].messages) == 3
    assert found["answered"].prompt(TUTOR) == render(found["held-out 1"].messages) + " Eso."
    assert found["held-out 1"].answer == {"role": "assistant", "content": "Eso."}


def test_longest_conversation_fits_and_is_for_ollama_only() -> None:
    long = make_conversations([], "", fits)[-1]
    assert (long.name, long.reach) == ("long", "published")
    assert 1850 < len(long.prompt(TUTOR)) <= 2000


def test_conversation_beyond_the_context_has_reach_nowhere() -> None:
    found = {item.name: item.reach for item in make_conversations([], "", lambda prompt: len(prompt) < 90)}
    assert found["special tokens"] == "nowhere"
    assert found["empty system"] == "served"
    assert "long" not in found


def test_conversations_are_deterministic() -> None:
    rows = [{"instruction": "¿a?", "response": "b"}, {"instruction": "¿c?", "response": "d"}]
    one, two = (make_conversations(rows, "s", fits) for _ in range(2))
    assert one == two
    assert isinstance(one[0], Conversation)


def test_template_of_a_base_gets_no_prefill_and_no_empty_system() -> None:
    class Base(TutorFormat):
        kind = "base"

    rows = [{"instruction": "¿Qué?", "response": "Eso."}]
    left_out = {item.name for item in make_conversations(rows, "", fits)}
    left_out -= {item.name for item in make_conversations(rows, "", fits, Base())}
    assert left_out == {"answered", "empty system"}
