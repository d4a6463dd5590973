"""Find in a base's chat template what training and serving need, or the reason why it cannot be served as trained.

In: the template, facts of its tokenizer, the recipe's `reasoning` and system text. Out: a `BaseFormat`. Renders probes
twice: the prompt of a question, as it is served, and the whole conversation, as the template continues it. What stands
between a question and its answer must be the same in both, but for a thought. Loads no tokenizer and reads no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.base_format import BaseFormat, Reasoning
from tutor.prompt.fixed_template import DATES, DAY, KEPT, SWITCHES, fix_template, fixed_values
from tutor.prompt.jinja import NO_TOOLS, TemplateError, render_template
from tutor.prompt.messages import Message
from tutor.prompt.thoughts import Thought, find_thought

QUESTION = "Pregunta <1> & \"dos\" \\ 'tres'\n\n  {{ cuatro }} {% cinco %} ¿ñ?"
ANSWER = "Una respuesta <1> & \"dos\" \\ 'tres'\n\n  {{ cuatro }}\tñ."
REASONING = "Un pensamiento <1> &\n\n  ñ."
SYSTEM = 'Eres <1> & "dos"\n\n  {{ ñ }}.'
"""Texts that a template must write unchanged: signs that HTML, JSON or Jinja itself would change, inner blanks."""
NEXT, LATER = "Otra pregunta.", "Otra respuesta."
OTHER_PROMPT = 'set prompt = "tutor", or name another base'
"""Next step where the template cannot be used."""
OTHER_DAY = date(2031, 2, 3)
"""A date that no fixed prompt may name."""
SHOWN = 300
"""Maximum characters of a rendering in an error."""


@dataclass(frozen=True)
class TokenFacts:
    """Facts of a tokenizer that its template depends on."""

    bos: str  # text; "" where there is none
    eos: str
    add_bos: bool  # measured: it puts BOS before plain text
    added: Mapping[str, int]  # ids of added tokens by text


@dataclass(frozen=True)
class _Turn:
    """What a template writes around an answer, with thoughts switched as the recipe has it."""

    prompt: str  # between the question and the end of the served prompt
    before: str  # between the question and the answer, in the whole conversation
    after: str  # behind the answer


def analyse_template(
    template: str, facts: TokenFacts, *, where: str, reasoning: Reasoning, system: str = ""
) -> BaseFormat:
    """Return the format of a base's template. `where` names the base in errors; `system` is the recipe's text.

    Raises ArtifactError for a template that cannot be served as trained, RecipeError where the recipe asks for what it
    does not have.
    """
    try:
        values = fixed_values(template, bos=facts.bos, eos=facts.eos, thoughts=reasoning == "rows")
        fixed = fix_template(template, values)
        _check_fixed(template, fixed, values, where)
        turn = _turn(fixed, where)
        off = _turn(fix_template(template, {**values, **{name: False for name in SWITCHES if name in values}}), where)
        thought = find_thought(fixed, turn.prompt, _around_thought(fixed), off.prompt, where, reasoning)
        if thought.suffix:
            fixed = fix_template(template, values, thought.suffix)
            turn = _turn(fixed, where)
        _check_engines(fixed, facts, where)
        _check_turns(fixed, turn, where)
        has_system, refusal = _system(fixed, turn, where)
    except TemplateError as error:
        raise ArtifactError(f"the chat template of {where} cannot be used: {error}", OTHER_PROMPT) from None
    if system and not has_system:
        raise RecipeError(
            f"the recipe has a system text, and the chat template of {where} has no place for one ({refusal})",
            'remove system, or set prompt = "tutor"',
        )
    end, tail = _end(turn.after, facts, where)
    prompt = _prompt([_user(QUESTION)], fixed)
    if facts.bos and prompt.startswith(2 * facts.bos):
        raise ArtifactError(f"the chat template of {where} writes {facts.bos} twice: {_shown(prompt)}", OTHER_PROMPT)
    return BaseFormat(
        template=fixed,
        bos=facts.bos,
        add_bos=facts.add_bos,
        writes_bos=bool(facts.bos) and prompt.startswith(facts.bos),
        end=end,
        end_id=facts.added[end],
        lead=_lead(turn, thought, where),
        tail=tail,
        system=has_system,
        # llama.cpp writes an empty thought before a prefill, and takes the prompt's end from a rendering without it.
        prefill="think" not in template.lower() and prompt.startswith(_whole([_user(QUESTION)], fixed)),
        reasoning=reasoning,
        tags=thought.tags,
        opening=thought.opening,
        closing=thought.closing,
        opened=thought.opened,
    )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, **other: str) -> Message:
    return {"role": "assistant", "content": text, **other}


def _prompt(messages: Sequence[Message], template: str, **other: Any) -> str:
    return render_template(template, messages, add_generation_prompt=True, **{**NO_TOOLS, **other})


def _whole(messages: Sequence[Message], template: str) -> str:
    return render_template(template, messages, add_generation_prompt=False, **NO_TOOLS)


def _turn(template: str, where: str) -> _Turn:
    """Return what stands around an answer. Raises ArtifactError where a text is not written as it is."""
    prompt = _prompt([_user(QUESTION)], template)
    whole = _whole([_user(QUESTION), _assistant(ANSWER)], template)
    if QUESTION not in prompt or QUESTION not in whole:
        raise _changed(where, "questions", QUESTION, prompt if QUESTION not in prompt else whole)
    behind = whole.rpartition(QUESTION)[2]
    if ANSWER not in behind:
        raise _changed(where, "answers", ANSWER, whole)
    before, _, after = behind.partition(ANSWER)
    if not after.strip():  # a template may leave the last answer open; an earlier one it must end
        later = _prompt([_user(QUESTION), _assistant(ANSWER), _user(NEXT)], template)
        following = later.rpartition(ANSWER)[2].partition(NEXT)[0]
        after = following if following.lstrip() == following else after
    return _Turn(prompt.rpartition(QUESTION)[2], before, after)


def _around_thought(template: str) -> tuple[str, str] | None:
    """Return what a template writes before and behind a thought; None where it leaves thoughts out."""
    messages = [_user(QUESTION), _assistant(ANSWER, reasoning=REASONING)]
    before, found, rest = _whole(messages, template).rpartition(QUESTION)[2].partition(REASONING)
    between, answered, _ = rest.partition(ANSWER)
    return (before, between) if found and answered else None


def _lead(turn: _Turn, thought: Thought, where: str) -> str:
    """Return the blanks before an answer. Raises ArtifactError where a prompt does not lead to the answer."""
    lead = thought.lead(turn.prompt, turn.before)
    if lead is None:
        raise ArtifactError(
            f"the chat template of {where} writes another text before an answer than a prompt ends with: "
            f"{_shown(turn.before)} in a conversation, {_shown(turn.prompt)} in a prompt",
            OTHER_PROMPT,
        )
    return lead


def _end(after: str, facts: TokenFacts, where: str) -> tuple[str, str]:
    """Return the token that ends an answer and the blanks before it. Raises ArtifactError where there is none."""
    bare = after.lstrip()
    found = max((text for text in facts.added if text.strip() and bare.startswith(text)), key=len, default=None)
    if found is None:
        raise ArtifactError(
            f"the chat template of {where} ends an answer with {_shown(after)}, which is no token of its tokenizer: "
            "no answer could learn to end",
            OTHER_PROMPT,
        )
    return found, after[: len(after) - len(bare)]


def _system(template: str, turn: _Turn, where: str) -> tuple[bool, str]:
    """Return whether a template has a place for a system text, and why not."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}, _user(QUESTION)]
    try:
        prompt = _prompt(messages, template)
    except TemplateError as error:
        return False, str(error)
    if SYSTEM not in prompt:
        return False, "it leaves the text out or changes it"
    if prompt.rpartition(QUESTION)[2] != turn.prompt:
        raise ArtifactError(
            f"the chat template of {where} ends a prompt with a system text in another way: {_shown(prompt)}",
            OTHER_PROMPT,
        )
    return True, ""


def _check_turns(template: str, turn: _Turn, where: str) -> None:
    """Raise ArtifactError where a later prompt lacks a turn, or ends in another way."""
    turns = [_user(NEXT), _assistant(LATER), _user(f"{NEXT} {NEXT}"), _assistant(ANSWER), _user(QUESTION)]
    prompt = _prompt(turns, template)
    rest = prompt
    for message in turns:
        _, found, rest = rest.partition(message["content"])
        if not found:
            raise _changed(where, "earlier turns", message["content"], prompt)
    if rest != turn.prompt:
        raise ArtifactError(
            f"the chat template of {where} ends a later prompt with {_shown(rest)}, the first with "
            f"{_shown(turn.prompt)}",
            OTHER_PROMPT,
        )


def _check_fixed(template: str, fixed: str, values: Mapping[str, str | bool], where: str) -> None:
    """Raise ArtifactError where a fixed template writes another prompt than the base's with the same values."""
    given: dict[str, Any] = {**NO_TOOLS, **values}
    for messages in ([_user(QUESTION)], [_user(QUESTION), _assistant(ANSWER), _user(NEXT)]):
        expected = render_template(template, messages, day=DAY, add_generation_prompt=True, **given)
        if (found := _prompt(messages, fixed)) != expected:
            raise ArtifactError(
                f"the chat template of {where} cannot have fixed values: {_shown(found)} instead of {_shown(expected)}",
                OTHER_PROMPT,
            )


def _check_engines(template: str, facts: TokenFacts, where: str) -> None:
    """Raise ArtifactError where engines would render a fixed template to different prompts."""
    today = {name: OTHER_DAY.strftime(style) for name, style in DATES.items()}
    kept = {name: not value for name, value in KEPT.items()}
    engines: list[dict[str, Any]] = [
        {"bos_token": facts.bos or None, "eos_token": facts.eos, **NO_TOOLS},
        {**today, "bos_token": "<other>", "eos_token": "<other>", "enable_thinking": True},
        {**today, **kept, "bos_token": "<other>", "eos_token": "<other>", "enable_thinking": False, "thinking": True},
    ]
    for messages in ([_user(QUESTION)], [_user(QUESTION), _assistant(ANSWER), _user(NEXT)]):
        expected = _prompt(messages, template)
        for given in engines:
            found = render_template(template, messages, day=OTHER_DAY, add_generation_prompt=True, **given)
            if found != expected:
                raise ArtifactError(
                    f"the chat template of {where} depends on what an engine passes to it: {_shown(found)} instead of "
                    f"{_shown(expected)}",
                    OTHER_PROMPT,
                )


def _changed(where: str, what: str, text: str, rendered: str) -> ArtifactError:
    return ArtifactError(
        f"the chat template of {where} changes {what}: {text!r} is not in {_shown(rendered)}", OTHER_PROMPT
    )


def _shown(text: str) -> str:
    """A rendering for an error: its end, where it is long."""
    return repr(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}")
