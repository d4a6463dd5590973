"""Sentences that ask for an answer in a language, for questions to a model that was not tuned on it.

In: a value of data.language. Out: the sentence, in that language where it is written here, else in English.
"""

from tutor.recipe.values import ANY_LANGUAGE, LANGUAGES

LINES = {
    "af": "Antwoord in Afrikaans.", "bg": "Отговори на български.", "bs": "Odgovori na bosanskom.",
    "ca": "Respon en català.", "cs": "Odpověz česky.", "da": "Svar på dansk.", "de": "Antworte auf Deutsch.",
    "el": "Απάντησε στα ελληνικά.", "en": "Answer in English.", "eo": "Respondu en Esperanto.",
    "es": "Responde en español.", "et": "Vasta eesti keeles.", "eu": "Erantzun euskaraz.", "fi": "Vastaa suomeksi.",
    "fr": "Réponds en français.", "hr": "Odgovori na hrvatskom.", "hu": "Válaszolj magyarul.",
    "id": "Jawab dalam bahasa Indonesia.", "is": "Svaraðu á íslensku.", "it": "Rispondi in italiano.",
    "ja": "日本語で答えてください。", "ko": "한국어로 답해 주세요.", "la": "Responde Latine.",
    "lt": "Atsakyk lietuviškai.", "lv": "Atbildi latviski.", "mk": "Одговори на македонски.",
    "ms": "Jawab dalam bahasa Melayu.",
    "nb": "Svar på norsk bokmål.", "nl": "Antwoord in het Nederlands.", "nn": "Svar på nynorsk.",
    "pl": "Odpowiedz po polsku.", "pt": "Responde em português.", "ro": "Răspunde în română.",
    "ru": "Ответь на русском языке.", "sk": "Odpovedz po slovensky.", "sl": "Odgovori v slovenščini.",
    "sq": "Përgjigju në shqip.", "sr": "Одговори на српском.", "sv": "Svara på svenska.", "tr": "Türkçe cevap ver.",
    "uk": "Відповідай українською.", "vi": "Hãy trả lời bằng tiếng Việt.", "zh": "请用中文回答。",
}  # fmt: skip
"""Sentences by ISO 639-1 code."""


def language_line(language: str) -> str:
    """Return the sentence for a language; "" for answers in any language."""
    if language == ANY_LANGUAGE:
        return ""
    return LINES.get(language) or f"Answer in {LANGUAGES[language]}."
