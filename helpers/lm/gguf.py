"""Models in GGUF files, as llama.cpp reads them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder, as safetensors in float32.

    What was rounded to a few bits stays so: a weight becomes the number that its bits stand for. Raises ValueError
    with one sentence that names the file and the remedy.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:  # its reader raises whatever it stumbles over
        raise ValueError(_cannot_read(source, error)) from error
    if report["missing_keys"]:
        raise ValueError(_cannot_read(source, f"its weights lack {min(report['missing_keys'])}"))
    del model.config.quantization_config  # of what is in the file; a model that has it cannot be saved
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cannot_read(source: Path, error: Exception | str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"The model file {source.name} cannot be read ({reason}): it is damaged or cut short, or of an architecture "
        "that transformers does not read from GGUF; get it again, or give the model as a folder of safetensors."
    )
