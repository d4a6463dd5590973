"""engines/protocol.py: the generation settings of a recipe, for the served model and for an evaluation."""

from dataclasses import asdict

from tutor.engines.protocol import greedy, sampling
from tutor.prompt.tutor_format import STOPS
from tutor.recipe.settings import GenerateSettings

SETTINGS = GenerateSettings(
    max_new_tokens=9, temperature=0.5, top_p=0.8, repetition_penalty=1.1
)  # other than the defaults


def test_sampling_has_the_settings_of_the_recipe() -> None:
    assert asdict(sampling(SETTINGS, 7)) == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stops": STOPS,
        "top_k": 40,
        "repeatable": False,
    }


def test_greedy_differs_from_sampling_in_temperature_and_top_p() -> None:
    found, served = asdict(greedy(SETTINGS, 7)), asdict(sampling(SETTINGS, 7))
    assert {name: value for name, value in found.items() if value != served[name]} == {"temperature": 0.0, "top_p": 1.0}
