"""The base's own chat template at the base stage: analysed, and proven against the base's tokenizer and weights.

In: the recipe, the model folder, its facts. Out: `prompt` of base.json; {} for prompt = "tutor". Does not render rows.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import Facts, load_tokenizer
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.fixed_template import DATES, DAY
from tutor.prompt.jinja import template_names
from tutor.prompt.messages import conversation
from tutor.prompt.template_analysis import OTHER_PROMPT, TokenFacts, analyse_template
from tutor.stages.base.end_token import check_end_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)


def prompt_facts(recipe: "Recipe", model: Path, facts: Facts) -> dict[str, Any]:
    """Return what `read_format` needs of a base's template. Raises ArtifactError or RecipeError for an unfit one."""
    if recipe.prompt == "tutor":
        return {}
    tokenizer = load_tokenizer(model)
    template = chat_template_of(tokenizer, model)
    tokens = TokenFacts(
        bos=tokenizer.bos_token or "",
        eos=tokenizer.eos_token or "",
        add_bos=facts.add_bos,
        added={str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()},
    )
    prompt = analyse_template(template, tokens, where=str(model), reasoning=recipe.reasoning, system=recipe.system)
    _check_ids(tokenizer, prompt, model)
    check_end_row(model, prompt)
    log.info("prompts are written by the base's chat template; answers end with %s", prompt.end)
    if {"strftime_now", *DATES} & template_names(template):
        log.info("its prompts name the date, which is %s in training and in serving", DAY.isoformat())
    return prompt.to_json()


def chat_template_of(tokenizer: "PreTrainedTokenizerBase", model: Path) -> str:
    """Return the template of a tokenizer, the default one of several. Raises ArtifactError where there is none."""
    found: Any = tokenizer.chat_template
    if isinstance(found, Mapping):
        found = found.get("default")
    if not isinstance(found, str) or not found.strip():
        raise ArtifactError(f"{model} has no chat template, so it was not tuned on conversations", OTHER_PROMPT)
    return found


def _check_ids(tokenizer: "PreTrainedTokenizerBase", prompt: BaseFormat, model: Path) -> None:
    """Raise ArtifactError where the ids of a prompt or of an end are others than a server has."""
    end = list(tokenizer(prompt.end, add_special_tokens=False)["input_ids"])
    if end != [prompt.end_id]:
        raise ArtifactError(f"{model}: its tokenizer makes {end} of {prompt.end}, not {prompt.end_id}", OTHER_PROMPT)
    text = prompt.render(conversation("¿Qué es una interfaz?"))
    served = list(tokenizer(text)["input_ids"])
    template = prompt.chat_template(add_bos=prompt.add_bos)
    messages = [dict(message) for message in conversation("¿Qué es una interfaz?")]
    applied = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    if list(applied) != served:
        raise ArtifactError(
            f"{model}: transformers makes other ids of a prompt than of its text: {list(applied)[:8]} and {served[:8]}",
            OTHER_PROMPT,
        )
