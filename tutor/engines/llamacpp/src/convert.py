"""Start llama.cpp's own converter with changes: a name for unknown pre-tokenizers, additional key-values, the
architecture, the weight files, and negative ids of special tokens, with which old configurations mean none.

    python convert.py LLAMACPP JOBS

JOBS is a JSON list of objects: the folder `model`, the names of its weight `files`, the file `target` and the `type` of
its numbers, `names`, `metadata`, `architecture`, `chat_template`, `end` and the converter's `options`. One process
converts all of them: to import torch and transformers takes longer than to convert a small model.
The converter identifies a byte-level BPE by a hash of one test string's tokens and refuses every unknown hash. `names`
are llama.cpp's names of the pre-tokenizer in tokenizer.json; none for SentencePiece. The name that the converter
identifies must be one of them; an unknown tokenizer gets the first. `metadata` are strings to write into the file. The
converter reads the `architecture` in config.json, which may lack it or have the name of a class without a head.
`chat_template` and `end`, the id of the token that ends a turn, are written unless null, for those of the folder.
Before each model it prints CONVERTING and the folder.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONVERTING = "tutor converts "
"""Beginning of the line before the output of each conversion."""


def text_model(llamacpp: str, metadata: Callable[[], Mapping[str, str]]) -> Any:
    """llama.cpp's class of text models, changed to write the strings that `metadata` returns as key-values.

    It no longer guesses general.* from the folder: the names given to the converter remain.
    """
    # First in sys.path: the converter, `conversion` and gguf-py of one version belong together.
    sys.path[:0] = [llamacpp, str(Path(llamacpp) / "gguf-py")]
    model = importlib.import_module("conversion.base").TextModel
    # Its guesses come from a folder's name, config.json and model card, which can name a path of this machine.
    gguf_metadata = importlib.import_module("gguf").Metadata
    guess = gguf_metadata.apply_metadata_heuristic
    gguf_metadata.apply_metadata_heuristic = staticmethod(
        lambda metadata, _card, _params, _folder, total: guess(metadata, {}, {}, Path("model"), total)
    )
    prepare_metadata = model.prepare_metadata

    def prepare_all_metadata(self: Any, *args: Any, **options: Any) -> None:
        prepare_metadata(self, *args, **options)
        for key, value in metadata().items():
            self.gguf_writer.add_string(key, value)

    model.prepare_metadata = prepare_all_metadata
    return model


def change_reading(model: Any, job: Callable[[], Mapping[str, Any]]) -> None:
    """Change what llama.cpp's class of models reads: architecture, files and template of the job, no negative ids."""
    load = model.load_hparams
    special = importlib.import_module("gguf.vocab").SpecialVocab
    set_token, add_tokens = special._set_special_token, special.add_to_gguf

    def load_hparams(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**load(*arguments, **options), "architectures": [job()["architecture"]]}

    def get_model_part_names(_folder: Path, _prefix: str, suffix: str) -> list[str]:
        return [name for name in job()["files"] if name.endswith(suffix)]

    def set_special_token(self: Any, kind: str, id_: Any) -> None:
        if not isinstance(id_, int) or id_ >= 0:
            set_token(self, kind, id_)

    def add_to_gguf(self: Any, *arguments: Any, **options: Any) -> None:
        if job()["chat_template"] is not None:
            self.chat_template = job()["chat_template"]
        if job()["end"] is not None:
            self.special_token_ids["eot"] = job()["end"]
        add_tokens(self, *arguments, **options)

    model.load_hparams = staticmethod(load_hparams)
    model.get_model_part_names = staticmethod(get_model_part_names)
    special._set_special_token = set_special_token
    special.add_to_gguf = add_to_gguf


def main() -> None:
    """Write the GGUF file of each job. Ends with the converter's own traceback, or with one line."""
    llamacpp, listed = sys.argv[1:]
    jobs = json.loads(listed)
    job = jobs[0]
    model_class = text_model(llamacpp, lambda: job["metadata"])
    converter = importlib.import_module("convert_hf_to_gguf")
    recognise = model_class.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        names: list[str] = job["names"]
        try:
            found = str(recognise(self, tokenizer))
        except NotImplementedError:
            if not names:
                raise
            return names[0]
        if found not in names:
            expected = names[0] if names else "SentencePiece"
            raise SystemExit(f"the converter identifies this tokenizer as {found!r}, tokenizer.json has {expected!r}")
        return found

    model_class.get_vocab_base_pre = get_vocab_base_pre
    change_reading(importlib.import_module("conversion.base").ModelBase, lambda: job)
    for job in jobs:
        print(f"{CONVERTING}{job['model']}", flush=True)  # noqa: T201 - stdout is the interface
        name = Path(job["target"]).name.partition("-")[0]
        options = ["--outfile", job["target"], "--outtype", job["type"], "--model-name", name, *job["options"]]
        sys.argv = ["convert_hf_to_gguf.py", job["model"], *options]
        converter.main()


if __name__ == "__main__":
    main()
